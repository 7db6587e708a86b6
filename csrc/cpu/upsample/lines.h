// Kernels of the upsampled convolution on the CPU: what lies between its matrix products.
//
// They work on lines of pixels whose channels lie side by side, on the calling thread. They are
// compiled once for each instruction set (lines_*.cpp) and chosen at run time.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

// S is what tensors hold, A what sums are formed in: float for float and bfloat16.
template <typename S, typename A>
struct LineKernels {
  const char* instruction_set;

  // out [pixels, channels] = sum over n of weights[n] * sources[n], pixels `stride` apart in the
  // sources and dense in `out`. Without sources, zeros.
  void (*weighted_sum)(const S* const* sources, const A* weights, int64_t n, int64_t pixels,
                       int64_t channels, int64_t stride, A* out);

  // The same of sums, which are dense; the result is stored.
  void (*weighted_sum_stored)(const A* const* sources, const A* weights, int64_t n,
                              int64_t count, S* out);
  void (*weighted_sum_of_sums)(const A* const* sources, const A* weights, int64_t n,
                               int64_t count, A* out);

  // out = sums [pixels, channels] + bias [channels] + addend, then max(., 0) if `relu`; NaN kept.
  // bias and addend may be null; pixels of addend and out are `stride` apart.
  void (*finish)(const A* sums, int64_t pixels, int64_t channels, const A* bias, const S* addend,
                 bool relu, int64_t stride, S* out);

  // totals [channels] += the sum of x over the pixels, `stride` apart.
  void (*add_pixels)(const S* x, int64_t pixels, int64_t channels, int64_t stride, A* totals);

  // Mean of x over the pixels, `stride` apart, and the sum of squared deviations from it.
  void (*moments)(const S* x, int64_t pixels, int64_t channels, int64_t stride, A* mean,
                  A* squares);

  // out = (x - mean) * scale + bias, then max(., 0) if `relu`; NaN kept. Dense pixels.
  void (*normalize)(const S* x, int64_t pixels, int64_t channels, const A* mean, const A* scale,
                    const A* bias, bool relu, S* out);

  // With dz = grad where that output is above 0, or without `relu` grad: the sums of dz and of
  // dz * (x - mean) over the pixels.
  void (*norm_sums)(const S* grad, const S* x, int64_t pixels, int64_t channels, const A* mean,
                    const A* scale, const A* bias, bool relu, A* sums, A* dots);

  // out = dz * scale - off - (x - mean) * slope.
  void (*norm_gradient)(const S* grad, const S* x, int64_t pixels, int64_t channels, const A* mean,
                        const A* scale, const A* bias, const A* off, const A* slope, bool relu,
                        S* out);

  // The transforms of winograd.cpp, a channel each. 4 x 4 inputs, or 2 x 2 outputs' gradients, pixels
  // dense and rows `row` apart, to 16 places `step` apart.
  void (*winograd_inputs)(const S* x, int64_t row, int64_t channels, int64_t step, A* to);
  void (*winograd_outputs)(const S* grad, int64_t row, int64_t channels, int64_t step, A* to);
  // 16 places, each from[place] + offset, to the first rows x columns of 2 x 2 outputs.
  void (*winograd_finish)(const A* const* from, int64_t offset, int64_t channels, int64_t rows,
                          int64_t columns, int64_t row, S* to);

  // to[t * to_tap + r * to_row + c] = from[taps[t] + r * row + c * column], t < n, r < rows and
  // c < columns.
  void (*pack)(const S* from, const int64_t* taps, int64_t n, int64_t rows, int64_t columns,
               int64_t row, int64_t column, int64_t to_tap, int64_t to_row, S* to);

  // to[o * to_out + c * to_channel + taps[t]] = from[(c * n + t) * outs + o], added if `add`.
  void (*unpack)(const S* from, const int64_t* taps, int64_t n, int64_t outs, int64_t channels,
                 int64_t to_out, int64_t to_channel, bool add, S* to);

  // to[c * to_row + r] = from[r * row + c], r < rows and c < columns.
  void (*transpose)(const S* from, int64_t rows, int64_t columns, int64_t row, int64_t to_row,
                    S* to);
};

// The best table this processor runs.
template <typename S, typename A>
const LineKernels<S, A>& line_kernels() {
  return best_table<LineKernels<S, A>, S>();
}

}  // namespace spectralx::cpu
