// Kernels of the reconstruction losses on the CPU: what is done to a run of values side by side.
//
// They run on the calling thread, are compiled once for each instruction set (rows_*.cpp) and chosen
// at run time. T is what sums are formed in, float or double.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

template <typename T>
struct RowKernels {
  const char* instruction_set;

  // Sum over n values of (p - t)^2, and of |p - t|.
  T (*squares)(const T* p, const T* t, int64_t n);
  T (*absolutes)(const T* p, const T* t, int64_t n);

  // out = factor (p - t), and factor sign(p - t), which is 0 at 0 and for NaN.
  void (*difference)(const T* p, const T* t, int64_t n, T factor, T* out);
  void (*sign)(const T* p, const T* t, int64_t n, T factor, T* out);

  // Sum over n values of x, and of (x - mean)^2.
  T (*sum)(const T* x, int64_t n);
  T (*centred)(const T* x, int64_t n, T mean);

  // out = first_weight a + second_weight b; out = scale (x - mean).
  void (*combine)(const T* a, const T* b, int64_t n, T first_weight, T second_weight, T* out);
  void (*normalize)(const T* x, int64_t n, T mean, T scale, T* out);

  // out += weight x.
  void (*add)(const T* x, int64_t n, T weight, T* out);

  // out[i] = x[index[i]], and first_weight[i] x[index[i]] + second_weight[i] x[second[i]].
  void (*take)(const T* x, const int32_t* index, int64_t n, T* out);
  void (*interpolate)(const T* x, const int32_t* index, const int32_t* second, const T* first_weight,
                      const T* second_weight, int64_t n, T* out);

  // to[column * rows + row] = from[row * stride + column].
  void (*transpose)(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to);

  void (*widen)(const c10::BFloat16* x, int64_t n, T* out);
  void (*narrow)(const T* x, int64_t n, c10::BFloat16* out);
};

// The best table this processor runs.
template <typename T>
const RowKernels<T>& row_kernels() {
  return best_table<RowKernels<T>, T>();
}

}  // namespace spectralx::cpu
