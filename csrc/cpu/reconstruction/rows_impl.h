// The kernels of rows.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/reconstruction/rows.h"

#if SPECTRALX_X86_TARGETS
#include <emmintrin.h>
#endif

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/storage.h"

namespace {

using c10::BFloat16;
using spectralx::cpu::kPartial;
using spectralx::cpu::kSpill;
using spectralx::cpu::Lines;
using spectralx::cpu::RowKernels;

// partial[i % kPartial] += of(i)
template <typename T, typename Of>
inline void add_to(T (&partial)[kPartial], int64_t n, Of of) {
  int64_t i = 0;
  for (; i + kPartial <= n; i += kPartial) {
#pragma omp simd
    for (int64_t j = 0; j < kPartial; ++j) partial[j] += of(i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) partial[j] += of(i + j);
}

template <typename T>
inline T total_of(T (&partial)[kPartial]) {
  for (int64_t half = kPartial / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) partial[j] += partial[j + half];
  }
  return partial[0];
}

template <typename T, typename Of>
inline T sum_of(int64_t n, Of of) {
  alignas(64) T partial[kPartial] = {};
  add_to(partial, n, of);
  return total_of(partial);
}

// use(target), where target(i) is value i.
template <typename T, typename Use>
inline void with_target(const Lines<T>& t, Use use) {
  const T *x = t.x, *a = t.a, *b = t.b;
  const T first = t.first, second = t.second;
  if (a == nullptr) return use([=](int64_t i) { return x[i]; });
  if (x == nullptr) return use([=](int64_t i) { return first * a[i] + second * b[i]; });
  use([=](int64_t i) { return x[i] - (first * a[i] + second * b[i]); });
}

template <typename T, typename Of>
inline void sums_of(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n, T* sums,
                    Of of) {
  with_target(t, [=](auto target) {
    for (int64_t cell = 0; cell < cells; ++cell) {
      const T* from = p + cell * step;
      const int64_t at = cell * n;
      alignas(64) T partial[kPartial];
      std::memcpy(partial, sums + cell * kPartial, sizeof(partial));
      add_to(partial, n, [=](int64_t i) { return of(from[i] - target(at + i)); });
      std::memcpy(sums + cell * kPartial, partial, sizeof(partial));
    }
  });
}

template <typename T>
void squares(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n, T* sums) {
  sums_of(p, step, t, cells, n, sums, [](T d) { return d * d; });
}

template <typename T>
void absolutes(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n, T* sums) {
  sums_of(p, step, t, cells, n, sums, [](T d) { return std::fabs(d); });
}

template <typename T, typename Of>
inline void slopes_of(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n,
                      const T* factor, T* out, Of of) {
  with_target(t, [=](auto target) {
    for (int64_t cell = 0; cell < cells; ++cell) {
      const T *from = p + cell * step, scale = factor[cell];
      const int64_t at = cell * n;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[at + i] = of(from[i], target(at + i), scale);
    }
  });
}

template <typename T>
void difference(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n,
                const T* factor, T* out) {
  slopes_of(p, step, t, cells, n, factor, out, [](T a, T b, T scale) { return scale * (a - b); });
}

template <typename T>
void sign(const T* p, int64_t step, const Lines<T>& t, int64_t cells, int64_t n, const T* factor,
          T* out) {
  slopes_of(p, step, t, cells, n, factor, out, [](T a, T b, T scale) {
    return (a > b ? scale : T(0)) - (a < b ? scale : T(0));
  });
}

template <typename T>
void join(T* sums, int64_t cells, double* totals) {
  for (int64_t cell = 0; cell < cells; ++cell, sums += kPartial) {
    alignas(64) T partial[kPartial];
    std::memcpy(partial, sums, sizeof(partial));
    totals[cell] += static_cast<double>(total_of(partial));
    std::memset(sums, 0, sizeof(partial));
  }
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
void normalize(const T* x, int64_t n, T mean, T scale, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = scale * (x[i] - mean);
}

template <typename T>
void add(const T* x, int64_t n, T weight, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += weight * x[i];
}

// out[i] = of(i), over `channels` values from of(i) on; one channel: no vector is begun for a value.
template <typename T, typename Of>
inline void pixels_of(int64_t n, int64_t channels, T* out, Of of) {
  if (channels == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = of(i, 0);
    return;
  }
  for (int64_t i = 0; i < n; ++i, out += channels) {
    for (int64_t c = 0; c < channels; c += kSpill) {
#pragma omp simd
      for (int64_t j = 0; j < kSpill; ++j) out[c + j] = of(i, c + j);
    }
  }
}

template <typename T>
void take(const T* x, const int32_t* index, int64_t n, int64_t channels, T* out) {
  pixels_of(n, channels, out, [=](int64_t i, int64_t c) { return x[index[i] * channels + c]; });
}

template <typename T>
void interpolate(const T* x, const int32_t* index, const int32_t* second, const T* first_weight,
                 const T* second_weight, int64_t n, int64_t channels, T* out) {
  pixels_of(n, channels, out, [=](int64_t i, int64_t c) {
    return first_weight[i] * x[index[i] * channels + c] +
           second_weight[i] * x[second[i] * channels + c];
  });
}

template <typename T>
void take_twice(const T* x, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[2 * i] = out[2 * i + 1] = x[i];
}

template <typename T>
void interpolate_twice(const T* x, int64_t n, T* out) {
  constexpr T kNear = 0.75, kFar = 0.25;
  out[0] = x[0] + T(0) * x[n > 1 ? 1 : 0];  // as at any place: NaN times 0 is NaN
#pragma omp simd
  for (int64_t i = 0; i < n - 1; ++i) {
    out[2 * i + 1] = kNear * x[i] + kFar * x[i + 1];
    out[2 * i + 2] = kFar * x[i] + kNear * x[i + 1];
  }
  out[2 * n - 1] = kNear * x[n - 1] + kFar * x[n - 1];
}

// Four rows of four columns: the values of a column side by side, `stride` apart in `to`.
template <typename T>
inline void interleave_block(const T* from, int64_t stride, T* to, int64_t rows) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  Four a, b, c, d;
  std::memcpy(&a, from, sizeof(a)), std::memcpy(&b, from + stride, sizeof(b));
  std::memcpy(&c, from + 2 * stride, sizeof(c)), std::memcpy(&d, from + 3 * stride, sizeof(d));
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Four columns[4] = {__builtin_shufflevector(ab, cd, 0, 1, 4, 5),
                           __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                           __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5),
                           __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
  for (int64_t i = 0; i < 4; ++i) std::memcpy(to + i * rows, &columns[i], sizeof(Four));
}

template <typename T>
void interleave(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to) {
  // A cache line of four rows at a time: rows of planes may share a set of the cache.
  constexpr int64_t kColumns = 16;
  int64_t x = 0;
  if (rows >= 4) {
    for (; x + 4 <= columns; x += kColumns) {
      const int64_t end = std::min(x + kColumns, columns - 3);
      for (int64_t quad = 0; quad < rows; quad += 4) {
        const int64_t row = std::min(quad, rows - 4);  // the last four again, as it may be
        for (int64_t i = x; i < end; i += 4) {
          interleave_block(from + row * stride + i, stride, to + i * rows + row, rows);
        }
      }
    }
    x = columns / 4 * 4;
  }
  for (; x < columns; ++x) {
    for (int64_t row = 0; row < rows; ++row) to[x * rows + row] = from[row * stride + x];
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

inline void stream(const void* from, int64_t bytes, void* to) {
#if SPECTRALX_X86_TARGETS
  const auto* source = static_cast<const char*>(from);
  auto* target = static_cast<char*>(to);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64);
  const int64_t head = std::min(past == 0 ? 0 : 64 - past, bytes);
  std::memcpy(target, source, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
#pragma GCC unroll 4
    for (int64_t j = i; j < i + 64; j += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + j),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + j)));
    }
  }
  std::memcpy(target + i, source + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

inline void fence() {
#if SPECTRALX_X86_TARGETS
  _mm_sfence();
#endif
}

template <typename T>
constexpr RowKernels<T> table(const char* name) {
  return {name,         squares<T>, absolutes<T>,   difference<T>, sign<T>,
          join<T>,      sum<T>,     centred<T>,     normalize<T>,  add<T>,
          take<T>,      interpolate<T>, take_twice<T>, interpolate_twice<T>,
          interleave<T>, widen<T>,  narrow<T>,      stream,        fence};
}

}  // namespace

SPECTRALX_END_TARGET
