// The kernels of rows.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "cpu/reconstruction/rows.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/storage.h"

namespace {

using c10::BFloat16;
using spectralx::cpu::RowKernels;

// Partial sums that lie side by side: two vectors of sixteen floats, so that additions overlap and
// their order does not depend on the instruction set.
constexpr int64_t kPartial = 32;

template <typename T, typename Of>
inline T sum_of(int64_t n, Of of) {
  alignas(64) T partial[kPartial] = {};
  int64_t i = 0;
  for (; i + kPartial <= n; i += kPartial) {
#pragma omp simd
    for (int64_t j = 0; j < kPartial; ++j) partial[j] += of(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) partial[j] += of(i + j);
  for (int64_t half = kPartial / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) partial[j] += partial[j + half];
  }
  return partial[0];
}

template <typename T>
T squares(const T* p, const T* t, int64_t n) {
  return sum_of<T>(n, [=](int64_t i) { return (p[i] - t[i]) * (p[i] - t[i]); });
}

template <typename T>
T absolutes(const T* p, const T* t, int64_t n) {
  return sum_of<T>(n, [=](int64_t i) { return std::fabs(p[i] - t[i]); });
}

template <typename T>
T sum(const T* x, int64_t n) {
  return sum_of<T>(n, [=](int64_t i) { return x[i]; });
}

template <typename T>
T centred(const T* x, int64_t n, T mean) {
  return sum_of<T>(n, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
}

template <typename T>
void difference(const T* p, const T* t, int64_t n, T factor, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = factor * (p[i] - t[i]);
}

template <typename T>
void sign(const T* p, const T* t, int64_t n, T factor, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = (p[i] > t[i] ? factor : T(0)) - (p[i] < t[i] ? factor : T(0));
  }
}

template <typename T>
void combine(const T* a, const T* b, int64_t n, T first_weight, T second_weight, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = first_weight * a[i] + second_weight * b[i];
}

template <typename T>
void normalize(const T* x, int64_t n, T mean, T scale, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = scale * (x[i] - mean);
}

template <typename T>
void add(const T* x, int64_t n, T weight, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += weight * x[i];
}

template <typename T>
void take(const T* x, const int32_t* index, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[index[i]];
}

template <typename T>
void interpolate(const T* x, const int32_t* index, const int32_t* second, const T* first_weight,
                 const T* second_weight, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = first_weight[i] * x[index[i]] + second_weight[i] * x[second[i]];
  }
}

template <typename T>
void transpose(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to) {
  constexpr int64_t kBlock = 8;  // rows whose cache lines are written together
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t count = std::min(kBlock, rows - first);
    const T* block = from + first * stride;
    if (count == kBlock) {
      for (int64_t x = 0; x < columns; ++x) {
        T* line = to + x * rows + first;
        for (int64_t r = 0; r < kBlock; ++r) line[r] = block[r * stride + x];
      }
    } else {
      for (int64_t x = 0; x < columns; ++x) {
        T* line = to + x * rows + first;
        for (int64_t r = 0; r < count; ++r) line[r] = block[r * stride + x];
      }
    }
  }
}

template <typename T>
void widen(const BFloat16* x, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<T>(widen(x[i]));
  }
}

template <typename T>
void narrow(const T* x, int64_t n, BFloat16* out) {  // to the nearest, ties to even
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(static_cast<float>(x[i]), out[i]);
}

template <typename T>
constexpr RowKernels<T> table(const char* name) {
  return {name,       squares<T>,      absolutes<T>, difference<T>, sign<T>,
          sum<T>,     centred<T>,      combine<T>,   normalize<T>,
          add<T>,     take<T>,         interpolate<T>, transpose<T>,
          widen<T>,   narrow<T>};
}

}  // namespace

SPECTRALX_END_TARGET
