// The kernels of pixels.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another.
//
// Pixels are lanes and classes are gone through in order, so a sum over classes is the same whatever
// the instruction set's width, and equal logits stay equal.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "cpu/upsample/pixels.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/exponential.h"

namespace {

using spectralx::cpu::kLanes;
using spectralx::cpu::PixelKernels;
using spectralx::cpu::PixelRow;

template <typename T>
void combine(const T* top, const T* bottom, T first_weight, T second_weight, int64_t n, T* line) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) line[i] = first_weight * top[i] + second_weight * bottom[i];
}

// u of one class, kLanes pixels.
template <typename T>
inline void logits_of(const PixelRow<T>& row, int64_t tile, const T* line, T* out) {
  const T* first = row.first_weight + tile * kLanes;
  const T* second = row.second_weight + tile * kLanes;
  const int32_t base = row.base[tile];
  if (base < 0) {
    const int32_t* source = row.source + tile * kLanes;
    for (int j = 0; j < kLanes; ++j) {
      const T* at = line + source[j];
      out[j] = row.copy ? at[0] : first[j] * at[0] + second[j] * at[row.step];
    }
    return;
  }
  const T *a = line + base, *b = a + row.step;
  if (row.copy) {
    for (int j = 0; j < kLanes; ++j) out[j] = a[j];
    return;
  }
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) out[j] = first[j] * a[j] + second[j] * b[j];
}

// Fills row.values with u, `largest`, and row.best where wanted.
template <typename T>
inline void find_best(const PixelRow<T>& row, int64_t tile, T* largest) {
  alignas(64) T top[kLanes];  // registers, as `best` is
  alignas(64) int32_t best[kLanes];
  logits_of(row, tile, row.line, row.values);
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    top[j] = row.values[j];
    best[j] = 0;
  }
  for (int64_t k = 1; k < row.classes; ++k) {
    T* u = row.values + k * kLanes;
    logits_of(row, tile, row.line + k * row.stride, u);
    const auto class_ = static_cast<int32_t>(k);
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const T value = u[j];
      // Larger, or the first NaN.
      const bool better = !(value <= top[j]) & (top[j] == top[j]);
      best[j] = better ? class_ : best[j];
      top[j] = better ? value : top[j];
    }
  }
  std::copy(top, top + kLanes, largest);
  if (row.best != nullptr) std::copy(best, best + kLanes, row.best + tile * kLanes);
}

// sum of exp(u - largest) over the classes; kKeep: row.values become those exponentials.
template <bool kKeep, typename T>
inline void add_exponentials(const PixelRow<T>& row, const T* largest, T* sum) {
  alignas(64) T top[kLanes], total[kLanes];
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) {
    top[j] = largest[j];
    total[j] = 0;
  }
  T* u = row.values;
  for (int64_t k = 0; k < row.classes; ++k, u += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      const T value = exponential(u[j] - top[j]);
      if constexpr (kKeep) u[j] = value;
      total[j] += value;
    }
  }
  std::copy(total, total + kLanes, sum);
}

template <typename T>
inline void add_gradient(const PixelRow<T>& row, int64_t tile, const T* sum) {
  const int64_t at = tile * kLanes;
  alignas(64) T share[kLanes], hot_grad[kLanes];  // share: of exp(u - largest)
  alignas(64) T live[kLanes];                     // 0 at empty slots
#pragma omp simd
  for (int j = 0; j < kLanes; ++j) live[j] = row.column[at + j] < 0 ? T(0) : T(1);
  if (row.of_top != nullptr) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      hot_grad[j] = -row.of_top[at + j] / sum[j];
      share[j] = hot_grad[j] / sum[j];
    }
  } else {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      hot_grad[j] = row.of_hot[at + j];
      share[j] = row.of_softmax[at + j] / sum[j];
    }
  }
  const int32_t* hot = row.of_top ? row.best : row.hot;
  const T *first = row.first_weight + at, *second = row.second_weight + at;
  const int32_t base = row.base[tile];
  if (row.of_weight != nullptr) {
    for (int64_t k = 0; k < row.classes; ++k) {
      T* grad = row.values + k * kLanes;
      const T weight = row.class_weight[k];
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        grad[j] = share[j] * grad[j] - row.of_weight[at + j] * weight;
      }
    }
  } else {
    for (int64_t k = 0; k < row.classes; ++k) {
      T* grad = row.values + k * kLanes;
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) grad[j] *= share[j];
    }
  }
  for (int j = 0; j < kLanes; ++j) {
    if (live[j] != T(0) && hot[at + j] >= 0) row.values[hot[at + j] * kLanes + j] -= hot_grad[j];
  }
  const T* grad = row.values;
  T *a = row.first_grad, *b = row.second_grad;
  if (base < 0) {
    const int32_t* source = row.source + at;
    for (int64_t k = 0; k < row.classes; ++k, grad += kLanes, a += row.stride, b += row.stride) {
      for (int j = 0; j < kLanes; ++j) {
        if (live[j] == T(0)) continue;
        a[source[j]] += first[j] * grad[j];
        b[source[j]] += second[j] * grad[j];
      }
    }
    return;
  }
  a += base;
  b += base;
  for (int64_t k = 0; k < row.classes; ++k, grad += kLanes, a += row.stride, b += row.stride) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      // Anything may stand at an empty slot.
      const T value = live[j] != T(0) ? grad[j] : T(0);
      a[j] += first[j] * value;
      b[j] += second[j] * value;
    }
  }
}

template <typename T>
void pixels(const PixelRow<T>& row) {
  for (int64_t tile = 0; tile < row.tiles; ++tile) {
    const int64_t at = tile * kLanes;
    alignas(64) T largest[kLanes], sum[kLanes], log_sum[kLanes], smooth[kLanes];
    find_best(row, tile, largest);
    if (row.gap != nullptr) {
      for (int j = 0; j < kLanes; ++j) {
        const int32_t hot = std::max(row.hot[at + j], 0);
        row.gap[at + j] = largest[j] - row.values[hot * kLanes + j];
      }
    }
    if (row.smooth != nullptr) {
      for (int j = 0; j < kLanes; ++j) smooth[j] = 0;
      for (int64_t k = 0; k < row.classes; ++k) {
        const T* u = row.values + k * kLanes;
        const T weight = row.class_weight[k];
#pragma omp simd
        for (int j = 0; j < kLanes; ++j) smooth[j] += weight * (largest[j] - u[j]);
      }
      std::copy(smooth, smooth + kLanes, row.smooth + at);
    }
    if (!row.wants_exponentials) continue;
    if (row.first_grad == nullptr) {
      add_exponentials<false>(row, largest, sum);
    } else {
      add_exponentials<true>(row, largest, sum);
    }
    if (row.sum != nullptr) std::copy(sum, sum + kLanes, row.sum + at);
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) log_sum[j] = logarithm(sum[j]);
    if (row.log_sum != nullptr) std::copy(log_sum, log_sum + kLanes, row.log_sum + at);
    if (row.class_loss != nullptr) {
      for (int64_t k = 0; k < row.classes; ++k) {
        const T* u = row.values + k * kLanes;
        for (int j = 0; j < kLanes; ++j) {
          if (row.column[at + j] < 0) continue;
          row.class_loss[k] += row.of_weight[at + j] * (log_sum[j] + (largest[j] - u[j]));
        }
      }
    }
    if (row.first_grad != nullptr) add_gradient(row, tile, sum);
  }
}

template <typename T>
void spread(T* first_grad, T* second_grad, int64_t classes, int64_t stride, int64_t length,
            int64_t step, T first_weight, T second_weight, T* top_grad, T* bottom_grad) {
  for (int64_t k = 0; k < classes; ++k) {
    T *a = first_grad + k * stride, *b = second_grad + k * stride;
    T* top = top_grad + k * stride;
    if (step == 1) {
      a[length - 1] += b[length - 1];  // past the end the last source again
#pragma omp simd
      for (int64_t i = 1; i < length; ++i) a[i] += b[i - 1];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) a[i] += b[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) top[i] += first_weight * a[i];
    if (bottom_grad != nullptr) {
      T* bottom = bottom_grad + k * stride;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) bottom[i] += second_weight * a[i];
    }
    std::fill(a, a + stride, T(0));
    std::fill(b, b + stride, T(0));
  }
}

template <typename T>
constexpr PixelKernels<T> table(const char* name) {
  return {name, combine<T>, pixels<T>, spread<T>};
}

}  // namespace

SPECTRALX_END_TARGET
