// The pixels of one output row of upsampled logits: best class, sum of exponentials, loss terms and
// gradient, without forming the upsampled logits beyond kLanes pixels at a time.
//
// Compiled once for each instruction set (pixels_*.cpp) and chosen at run time.
#pragma once

#include <cstdint>

#include "cpu/instruction_sets.h"
#include "cpu/upsample/columns.h"

namespace spectralx::cpu {

// One row. Its logits u of class k at a slot are those of line[k] at the slot's two source columns,
// weighted. Null pointers: not wanted.
template <typename T>
struct PixelRow {
  // [classes, stride], the two source rows combined; readable for kLanes columns past the last
  // source column, which is stored once more behind itself.
  const T* line;
  int64_t classes, stride;
  // Slots, see columns.h. copy: u is line at the source column as it is.
  int64_t tiles, step;
  bool copy;
  const int32_t *base, *source, *column;
  const T *first_weight, *second_weight;

  const int32_t* hot;      // class whose logit is wanted, -1 for none
  const T* class_weight;   // [classes]
  bool wants_exponentials;
  T* values;  // scratch, [classes, kLanes]

  // Out, one a slot.
  int32_t* best;   // class of the largest logit: the lowest on ties, the first NaN if there is one
  T* sum;          // of exp(u - largest)
  T* log_sum;      // its logarithm
  T* gap;          // largest - u[hot]; anything where hot is -1
  T* smooth;       // sum over classes of class_weight (largest - u)

  // Gradient of u[c] at a slot: of_softmax softmax[c] - of_weight class_weight[c], less of_hot at
  // c = hot; or, if `of_top` is not null, of_top times that of the probability of the best class.
  // first_grad and second_grad [classes, stride] are added to, for the two source columns of a slot,
  // the latter not shifted by the step. All zero at empty slots.
  const T *of_softmax, *of_hot, *of_weight, *of_top;
  T *first_grad, *second_grad;

  // class_loss [classes] += sum over slots of of_weight (-log softmax[c]).
  T* class_loss;
};

template <typename T>
struct PixelKernels {
  const char* instruction_set;

  // line = first_weight top + second_weight bottom, n values.
  void (*combine)(const T* top, const T* bottom, T first_weight, T second_weight, int64_t n, T* line);

  void (*pixels)(const PixelRow<T>& row);

  // What `pixels` left in first_grad and second_grad joined to the gradient of a line of `length`
  // columns; added, times its weight, to the gradients of the two source rows (the second may be null);
  // and both cleared.
  void (*spread)(T* first_grad, T* second_grad, int64_t classes, int64_t stride, int64_t length,
                 int64_t step, T first_weight, T second_weight, T* top_grad, T* bottom_grad);
};

// The best table this processor runs.
template <typename T>
const PixelKernels<T>& pixel_kernels() {
  return best_table<PixelKernels<T>, T>();
}

}  // namespace spectralx::cpu
