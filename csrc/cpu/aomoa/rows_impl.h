// The row kernels of rows.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another.
//
// Sums run through `omp simd` reductions: lanes are added up in a fixed order, so bits repeat.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/aomoa/rows.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/exponential.h"

namespace {

using spectralx::cpu::kLogEpsilon;
using spectralx::cpu::RowKernels;

template <typename T>
void layer_norm(const T* x, int64_t rows, int64_t d, const T* weight, const T* bias, T eps,
                T* normed, T* out, T* mean, T* rstd) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x + i * d;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < d; ++j) sum += row[j];
    const T center = sum / static_cast<T>(d);
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < d; ++j) squares += (row[j] - center) * (row[j] - center);
    const T scale = T(1) / std::sqrt(squares / static_cast<T>(d) + eps);
    mean[i] = center;
    rstd[i] = scale;
    T* o = out + i * d;
    if (normed == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) o[j] = (row[j] - center) * scale * weight[j] + bias[j];
    } else {
      T* kept = normed + i * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        const T value = (row[j] - center) * scale;
        kept[j] = value;
        o[j] = value * weight[j] + bias[j];
      }
    }
  }
}

template <typename T>
void affine(const T* x, int64_t rows, int64_t d, const T* mean, const T* rstd, const T* weight,
            const T* bias, T* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const T center = mean ? mean[i] : T(0), scale = mean ? rstd[i] : T(1);
    const T* row = x + i * d;
    T* o = out + i * d;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) o[j] = (row[j] - center) * scale * weight[j] + bias[j];
  }
}

template <typename T>
void layer_norm_backward(const T* grad, const T* x, int64_t rows, int64_t d, const T* mean,
                         const T* rstd, const T* weight, bool accumulate, T* dx, T* dweight,
                         T* dbias) {
  for (int64_t i = 0; i < rows; ++i) {
    const T center = mean ? mean[i] : T(0), scale = mean ? rstd[i] : T(1);
    const T *row = x + i * d, *g = grad + i * d;
    T sum = 0, along = 0;  // of the gradient of the normalised row, and of it times the row
#pragma omp simd reduction(+ : sum, along)
    for (int64_t j = 0; j < d; ++j) {
      const T through = g[j] * weight[j];
      sum += through;
      along += through * ((row[j] - center) * scale);
    }
    sum /= static_cast<T>(d);
    along /= static_cast<T>(d);
    T* o = dx + i * d;
    if (accumulate) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        const T value = (row[j] - center) * scale;
        o[j] += rstd[i] * (g[j] * weight[j] - sum - value * along);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) {
        const T value = (row[j] - center) * scale;
        o[j] = rstd[i] * (g[j] * weight[j] - sum - value * along);
      }
    }
    if (dweight != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) dweight[j] += g[j] * ((row[j] - center) * scale);
    }
    if (dbias != nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) dbias[j] += g[j];
    }
  }
}

template <typename T>
void bias_relu(T* h, int64_t rows, int64_t n, const T* bias) {
  for (int64_t i = 0; i < rows; ++i) {
    T* row = h + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const T value = row[j] + bias[j];
      row[j] = value < T(0) ? T(0) : value;
    }
  }
}

// acc = log(exp(acc) + exp(term)); the larger plus a correction, so nothing overflows.
template <typename T>
inline T log_add(T acc, T term) {
  const T gap = acc - term;
  const T distance = gap < T(0) ? gap : -gap;
  return (gap < T(0) ? term : acc) + log_one_plus(exponential(distance));
}

template <typename T>
void combine(const T* y, const T* bias, int64_t rows, int64_t r, int64_t slots,
             const int32_t* experts, const int32_t* positions, const T* gates, T* c) {
  for (int64_t i = 0; i < rows; ++i) {
    T* out = c + i * r;
    bool first = true;
    for (int64_t s = i * slots; s < (i + 1) * slots; ++s) {
      if (experts[s] < 0) continue;
      const T log_gate = std::log(gates[s]);
      const T *row = y + positions[s] * r, *b = bias + experts[s] * r;
      if (first) {
#pragma omp simd
        for (int64_t j = 0; j < r; ++j) out[j] = row[j] + b[j] + log_gate;
      } else {
#pragma omp simd
        for (int64_t j = 0; j < r; ++j) out[j] = log_add(out[j], row[j] + b[j] + log_gate);
      }
      first = false;
    }
    if (first) std::fill(out, out + r, static_cast<T>(kLogEpsilon));
  }
}

template <typename T>
void combine_backward(T* y, const T* bias, int64_t rows, int64_t r, int64_t slots,
                      const int32_t* experts, const int32_t* positions, const T* gates, const T* c,
                      const T* dc, T* dgates) {
  for (int64_t i = 0; i < rows; ++i) {
    const T *combined = c + i * r, *grad = dc + i * r;
    for (int64_t s = i * slots; s < (i + 1) * slots; ++s) {
      dgates[s] = T(0);
      if (experts[s] < 0) continue;
      const T log_gate = std::log(gates[s]);
      T* row = y + positions[s] * r;
      const T* b = bias + experts[s] * r;
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < r; ++j) {
        const T share = exponential(row[j] + b[j] + log_gate - combined[j]);
        row[j] = grad[j] * share;
        sum += row[j];
      }
      dgates[s] = sum / gates[s];
    }
  }
}

template <typename T>
void column_sums(const T* x, int64_t rows, int64_t n, T* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += row[j];
  }
}

template <typename T>
constexpr RowKernels<T> table(const char* name) {
  return {name,          layer_norm<T>,       affine<T>,     layer_norm_backward<T>,
          bias_relu<T>,  combine<T>,          combine_backward<T>,
          column_sums<T>};
}

}  // namespace

SPECTRALX_END_TARGET
