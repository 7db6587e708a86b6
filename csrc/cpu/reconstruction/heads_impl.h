// The kernels of heads.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "cpu/reconstruction/heads.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/normal.h"
#include "cpu/common/storage.h"

namespace {

using c10::BFloat16;
using spectralx::cpu::Activation;
using spectralx::cpu::HeadKernels;
using spectralx::cpu::RowNorm;

// Calls each(x), the activation as a function of one value, so that its loop has no branch.
template <typename A, typename Each>
inline void with_activation(Activation activation, const Each& each) {
  switch (activation) {
    case Activation::kNone:
      return each([](A x) { return x; });
    case Activation::kGelu:
      return each([](A x) { return x * normal(x).below; });
    case Activation::kRelu:
      return each([](A x) { return x < A(0) ? A(0) : x; });  // NaN stays
    case Activation::kLeakyRelu:
      return each([](A x) { return x > A(0) ? x : A(0.01) * x; });
  }
}

// The same of its derivative.
template <typename A, typename Each>
inline void with_slope(Activation activation, const Each& each) {
  switch (activation) {
    case Activation::kNone:
      return each([](A) { return A(1); });
    case Activation::kGelu:
      return each([](A x) {
        const Normal<A> at = normal(x);
        return at.below + x * at.density;
      });
    case Activation::kRelu:
      return each([](A x) { return x <= A(0) ? A(0) : A(1); });
    case Activation::kLeakyRelu:
      return each([](A x) { return x > A(0) ? A(1) : A(0.01); });
  }
}

// row = before(x), then its deviations from their mean; the reciprocal of their standard deviation.
template <typename S, typename A>
inline A deviations(const S* x, const RowNorm<A>& norm, A* row) {
  const int64_t channels = norm.channels;
  with_activation<A>(norm.before, [&](const auto& f) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) row[c] = f(widen(x[c]));
  });
  if (norm.weight == nullptr) return A(1);
  A sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < channels; ++c) sum += row[c];
  const A mean = sum / static_cast<A>(channels);
#pragma omp simd reduction(+ : square)
  for (int64_t c = 0; c < channels; ++c) {
    const A d = row[c] - mean;
    row[c] = d;
    square += d * d;
  }
  return A(1) / std::sqrt(square / static_cast<A>(channels) + norm.eps);
}

template <typename S, typename A>
void norm_rows(const S* x, const S* addend, int64_t rows, const RowNorm<A>& norm, A scale, A* row,
               S* out) {
  const int64_t channels = norm.channels;
  for (int64_t r = 0; r < rows; ++r, x += channels, out += channels) {
    const A rstd = deviations(x, norm, row);
    if (norm.weight != nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) row[c] = row[c] * rstd * norm.weight[c] + norm.bias[c];
    }
    with_activation<A>(norm.after, [&](const auto& f) {
      if (addend == nullptr) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) store(f(row[c]), out[c]);
        return;
      }
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(f(row[c]) + scale * widen(addend[c]), out[c]);
    });
    if (addend != nullptr) addend += channels;
  }
}

template <typename S, typename A>
void norm_gradient(const S* grad, const S* x, int64_t rows, const RowNorm<A>& norm, A* scratch,
                   S* x_grad, A* weight_grad, A* bias_grad) {
  const int64_t channels = norm.channels;
  A *row = scratch, *dz = scratch + channels, *slope = scratch + 2 * channels;
  for (int64_t r = 0; r < rows; ++r, x += channels, grad += channels) {
    const A rstd = deviations(x, norm, row);
    if (norm.weight == nullptr) {
      with_slope<A>(norm.after, [&](const auto& f) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) dz[c] = widen(grad[c]) * f(row[c]);
      });
    } else {
      with_slope<A>(norm.after, [&](const auto& f) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          row[c] *= rstd;
          dz[c] = widen(grad[c]) * f(row[c] * norm.weight[c] + norm.bias[c]);
        }
      });
      if (weight_grad != nullptr) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          weight_grad[c] += dz[c] * row[c];
          bias_grad[c] += dz[c];
        }
      }
      if (x_grad == nullptr) continue;
      A sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t c = 0; c < channels; ++c) {
        const A h = dz[c] * norm.weight[c];
        dz[c] = h;
        sum += h;
        dot += h * row[c];
      }
      const A mean = sum / static_cast<A>(channels), along = dot / static_cast<A>(channels);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) dz[c] = rstd * (dz[c] - mean - row[c] * along);
    }
    if (x_grad == nullptr) continue;
    if (norm.before == Activation::kNone) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(dz[c], x_grad[c]);
    } else {
      with_slope<A>(norm.before, [&](const auto& f) {
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) slope[c] = f(widen(x[c]));
      });
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) store(dz[c] * slope[c], x_grad[c]);
    }
    x_grad += channels;
  }
}

template <typename S, typename A>
void gelu(const S* x, int64_t count, S* out, S* slope) {
  if (slope == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const A value = widen(x[i]);
      store(value * normal(value).below, out[i]);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A value = widen(x[i]);
    const Normal<A> at = normal(value);
    store(value * at.below, out[i]);
    store(at.below + value * at.density, slope[i]);
  }
}

// sums [channels] = what the taps around a pixel give, a channel each.
template <typename S, typename A>
inline void taps_at(const S* const* lines, int64_t pixel, int64_t width, int64_t channels,
                    const A* weight, A* sums) {
  std::fill(sums, sums + channels, A(0));
  const int64_t left = pixel == 0 ? 1 : 0, right = pixel == width - 1 ? 2 : 3;
  for (int64_t y = 0; y < 3; ++y) {
    if (lines[y] == nullptr) continue;
    for (int64_t x = left; x < right; ++x) {
      const S* from = lines[y] + (pixel + x - 1) * channels;
      const A* by = weight + (3 * y + x) * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) sums[c] += by[c] * widen(from[c]);
    }
  }
}

template <typename S, typename A>
void grouped(const S* const* lines, int64_t width, int64_t channels, const A* weight, const A* bias,
             A* sums, S* out, S* slope) {
  for (int64_t pixel = 0; pixel < width; ++pixel, out += channels) {
    taps_at(lines, pixel, width, 2 * channels, weight, sums);
    // In place: value j is read from 2j and 2j + 1.
    for (int64_t j = 0; j < channels; ++j) sums[j] = sums[2 * j] + sums[2 * j + 1] + bias[j];
    if (slope == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < channels; ++j) store(sums[j] * normal(sums[j]).below, out[j]);
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < channels; ++j) {
      const Normal<A> at = normal(sums[j]);
      store(sums[j] * at.below, out[j]);
      store(at.below + sums[j] * at.density, slope[j]);
    }
    slope += channels;
  }
}

template <typename S, typename A>
void twice(const S* grad, const S* slope, int64_t count, S* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    S value;
    store(widen(grad[i]) * widen(slope[i]), value);
    out[2 * i] = value;
    out[2 * i + 1] = value;
  }
}

template <typename S, typename A>
void depthwise(const S* const* lines, int64_t width, int64_t channels, const A* weight,
               const S* slope, int64_t together, int64_t stride, A* sums, S* out) {
  for (int64_t pixel = 0; pixel < width; ++pixel, slope += channels) {
    taps_at(lines, pixel, width, channels, weight, sums);
    S* to = out + pixel / together * stride + pixel % together * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) store(sums[c] * widen(slope[c]), to[c]);
  }
}

template <typename S, typename A>
void tap_gradients(const S* grad, const S* const* lines, int64_t width, int64_t channels,
                   int64_t first, int64_t last, A* sums) {
  for (int64_t y = 0; y < 3; ++y) {
    if (lines[y] == nullptr) continue;
    for (int64_t x = 0; x < 3; ++x) {
      A* to = sums + (3 * y + x) * channels;
      const int64_t begin = x == 0 ? 1 : 0, end = x == 2 ? width - 1 : width;
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const S* by = grad + pixel * channels;
        const S* from = lines[y] + (pixel + x - 1) * channels;
#pragma omp simd
        for (int64_t c = first; c < last; ++c) to[c] += widen(by[c]) * widen(from[c]);
      }
    }
  }
}

template <typename S, typename A>
constexpr HeadKernels<S, A> table(const char* name) {
  return {name,           norm_rows<S, A>, norm_gradient<S, A>, gelu<S, A>, grouped<S, A>,
          twice<S, A>,    depthwise<S, A>, tap_gradients<S, A>};
}

}  // namespace

SPECTRALX_END_TARGET
