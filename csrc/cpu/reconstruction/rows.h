// Kernels of the reconstruction losses on the CPU: what is done to a run of values side by side.
//
// They run on the calling thread, are compiled once for each instruction set (rows_*.cpp) and chosen
// at run time. T is what sums are formed in, float or double.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

// Sums are formed in so many lanes, value i of a cell in lane i % kPartial, whatever the instruction
// set: two vectors of sixteen floats, so that additions overlap.
constexpr int64_t kPartial = 32;

// Lines [pixels, channels] that pixels are put in or taken from a vector at a time are followed by as
// many values that may be read and written.
constexpr int64_t kSpill = 8;

// A target, value by value, as lines that lie in memory: x; or first a + second b where x is null; or
// x less that where none is.
template <typename T>
struct Lines {
  const T *x = nullptr, *a = nullptr, *b = nullptr;
  T first = 0, second = 0;
};

template <typename T>
struct RowKernels {
  const char* instruction_set;

  // Of `cells` runs of n values: predictions, of which a run begins `step` behind the one before, and
  // targets, run behind run. sums [cells, kPartial] += (p - t)^2, and |p - t|.
  void (*squares)(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n, T* sums);
  void (*absolutes)(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n, T* sums);

  // Of the same runs, run behind run: factor[cell] (p - t), and factor[cell] sign(p - t), which is 0
  // at 0 and for NaN.
  void (*difference)(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n,
                     const T* factor, T* out);
  void (*sign)(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n,
               const T* factor, T* out);

  // sums [cells, kPartial] to zero, their totals added to `totals`.
  void (*join)(T* sums, int64_t cells, double* totals);

  // Sum over n values of x, and of (x - mean)^2.
  T (*sum)(const T* x, int64_t n);
  T (*centred)(const T* x, int64_t n, T mean);

  // out = scale (x - mean).
  void (*normalize)(const T* x, int64_t n, T mean, T scale, T* out);

  // out += weight x.
  void (*add)(const T* x, int64_t n, T weight, T* out);

  // Of n pixels of `channels` values: out[i] = x[index[i]], and
  // first_weight[i] x[index[i]] + second_weight[i] x[second[i]]. kSpill values behind both.
  void (*take)(const T* x, const int32_t* index, int64_t n, int64_t channels, T* out);
  void (*interpolate)(const T* x, const int32_t* index, const int32_t* second, const T* first_weight,
                      const T* second_weight, int64_t n, int64_t channels, T* out);

  // The same of n values made 2 n, repeated and bilinearly.
  void (*take_twice)(const T* x, int64_t n, T* out);
  void (*interpolate_twice)(const T* x, int64_t n, T* out);

  // to[column * rows + row] = from[row * stride + column].
  void (*interleave)(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to);

  void (*widen)(const c10::BFloat16* x, int64_t n, T* out);
  void (*narrow)(const T* x, int64_t n, c10::BFloat16* out);

  // Copies past the caches, which read no line that they write; `fence` before another thread reads.
  void (*stream)(const void* from, int64_t bytes, void* to);
  void (*fence)();
};

// The best table this processor runs.
template <typename T>
const RowKernels<T>& row_kernels() {
  return best_table<RowKernels<T>, T>();
}

}  // namespace spectralx::cpu
