// The kernels of heads.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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

// out = GELU(v(i)) and slope(i) its derivative there, of a row.
template <typename A, typename Value, typename Out, typename Slope>
inline void gelu_row(int64_t count, const Value& v, const Out& out, const Slope& slope) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A value = v(i);
    const Normal<A> at = normal(value);
    out(i, value * at.below);
    slope(i, at.below + value * at.density);
  }
}

constexpr auto unwanted = [](int64_t, auto) {};

template <typename S, typename A>
void biased_gelu(const A* sums, const A* bias, int64_t rows, int64_t channels, int64_t stride, S* out,
                 S* slope) {
  for (int64_t row = 0; row < rows; ++row, sums += channels, out += stride) {
    const auto value = [&](int64_t c) { return sums[c] + bias[c]; };
    const auto to = [&](int64_t c, A found) { store(found, out[c]); };
    if (slope == nullptr) {
      gelu_row<A>(channels, value, to, unwanted);
      continue;
    }
    gelu_row<A>(channels, value, to, [&](int64_t c, A found) { store(found, slope[c]); });
    slope += channels;
  }
}

template <typename S, typename A>
void biased(const A* sums, const A* bias, int64_t count, S* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(sums[i] + bias[i], out[i]);
}

template <typename S, typename G>
void scaled(const G* grad, const S* slope, int64_t count, S* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(widen(grad[i]) * widen(slope[i]), out[i]);
}

template <typename S, typename A>
void split_gelu(const S* x, int64_t pixels, int64_t channels, A* row, S* out, S* slope) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += 2 * channels, out += 2 * channels) {
    const auto value = [&](int64_t c) { return widen(x[c]); };
    const auto to = [&](int64_t c, A found) { row[c] = found; };
    if (slope == nullptr) {
      gelu_row<A>(2 * channels, value, to, unwanted);
    } else {
      gelu_row<A>(2 * channels, value, to, [&](int64_t c, A found) { store(found, slope[c]); });
      slope += 2 * channels;
    }
#pragma omp simd
    for (int64_t j = 0; j < channels; ++j) {
      store(row[2 * j], out[j]);
      store(row[2 * j + 1], out[channels + j]);
    }
  }
}

// A vector of 64 bytes, which narrower instruction sets hold in parts.
template <typename A>
struct Vector {
  static constexpr int64_t kLanes = 64 / sizeof(A);
  typedef A Lanes __attribute__((vector_size(64)));
  Lanes lanes;
};

template <typename A>
inline Vector<A> load(const A* from) {
  Vector<A> to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

inline Vector<float> load(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector<float> to;
  std::memcpy(&to, &words, sizeof(to));
  return to;
}

// use(line, place of the pixel in it, tap) for the taps around a pixel.
template <typename S, typename Use>
inline void for_taps(const S* const* lines, int64_t pixel, int64_t width, const Use& use) {
  const int64_t left = pixel == 0 ? 1 : 0, right = pixel == width - 1 ? 2 : 3;
  for (int64_t y = 0; y < 3; ++y) {
    if (lines[y] == nullptr) continue;
    for (int64_t x = left; x < right; ++x) use(lines[y], pixel + x - 1, 3 * y + x);
  }
}

// run(channel, vectors) for all channels, four vectors or one at a time; the first channel that no whole
// vector holds.
template <typename A, typename Run>
inline int64_t for_vectors(int64_t channels, const Run& run) {
  constexpr int64_t kLanes = Vector<A>::kLanes;
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) run(c, std::integral_constant<int, 4>());
  for (; c + kLanes <= channels; c += kLanes) run(c, std::integral_constant<int, 1>());
  return c;
}

template <typename S, typename A>
void grouped(const S* const* lines, int64_t width, int64_t channels, int64_t first, int64_t last,
             const A* weight, const A* bias, A* sums, int64_t stride, S* out, S* slope) {
  for (int64_t pixel = first; pixel < last; ++pixel, out += stride) {
    // A few vectors of sums stay in registers over all taps.
    int64_t c = for_vectors<A>(channels, [&](int64_t from, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      Vector<A> sum[kVectors] = {};
      for_taps(lines, pixel, width, [&](const S* line, int64_t place, int64_t tap) {
        const S* values = line + place * 2 * channels + from;
        const A* by = weight + tap * 2 * channels + from;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = v * Vector<A>::kLanes;
          sum[v].lanes += load(values + at).lanes * load(by + at).lanes;
          sum[v].lanes += load(values + channels + at).lanes * load(by + channels + at).lanes;
        }
      });
      std::memcpy(sums + from, sum, sizeof(sum));
    });
    for (; c < channels; ++c) {
      A sum = 0;
      for_taps(lines, pixel, width, [&](const S* line, int64_t place, int64_t tap) {
        const S* values = line + place * 2 * channels + c;
        const A* by = weight + tap * 2 * channels + c;
        sum += widen(values[0]) * by[0] + widen(values[channels]) * by[channels];
      });
      sums[c] = sum;
    }
    biased_gelu<S, A>(sums, bias, 1, channels, 0, out, slope);
    if (slope != nullptr) slope += channels;
  }
}

template <typename S, typename A>
void spread(const S* const* grad, int64_t width, int64_t channels, const A* weight, const S* slope,
            int64_t together, int64_t step, A* sums, S* out) {
  for (int64_t pixel = 0; pixel < width; ++pixel, slope += 2 * channels) {
    int64_t c = for_vectors<A>(channels, [&](int64_t from, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      Vector<A> even[kVectors] = {}, odd[kVectors] = {};
      for_taps(grad, pixel, width, [&](const S* line, int64_t place, int64_t tap) {
        const S* values = line + place * channels + from;
        const A* by = weight + tap * 2 * channels + from;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = v * Vector<A>::kLanes;
          const Vector<A> value = load(values + at);
          even[v].lanes += value.lanes * load(by + at).lanes;
          odd[v].lanes += value.lanes * load(by + channels + at).lanes;
        }
      });
      std::memcpy(sums + from, even, sizeof(even));
      std::memcpy(sums + channels + from, odd, sizeof(odd));
    });
    for (; c < channels; ++c) {
      A even = 0, odd = 0;
      for_taps(grad, pixel, width, [&](const S* line, int64_t place, int64_t tap) {
        const A value = widen(line[place * channels + c]);
        const A* by = weight + tap * 2 * channels + c;
        even += value * by[0];
        odd += value * by[channels];
      });
      sums[c] = even;
      sums[channels + c] = odd;
    }
    S* to = out + pixel / together * step + pixel % together * 2 * channels;
#pragma omp simd
    for (int64_t j = 0; j < channels; ++j) {
      store(sums[j] * widen(slope[2 * j]), to[2 * j]);
      store(sums[channels + j] * widen(slope[2 * j + 1]), to[2 * j + 1]);
    }
  }
}

template <typename S, typename A>
void tap_gradients(const S* grad, const S* const* lines, int64_t width, int64_t channels,
                   int64_t first, int64_t last, A* sums) {
  for (int64_t pixel = 0; pixel < width; ++pixel) {
    const S* by = grad + pixel * channels;
    for_taps(lines, pixel, width, [&](const S* line, int64_t place, int64_t tap) {
      for (int64_t part = 0; part < 2; ++part) {
        const S* values = line + (2 * place + part) * channels;
        A* to = sums + (2 * tap + part) * channels;
#pragma omp simd
        for (int64_t c = first; c < last; ++c) to[c] += widen(by[c]) * widen(values[c]);
      }
    });
  }
}

template <typename S, typename A>
constexpr HeadKernels<S, A> table(const char* name) {
  return {name,         norm_rows<S, A>, norm_gradient<S, A>, biased_gelu<S, A>,
          biased<S, A>, scaled<S, A>,    scaled<S, S>,        split_gelu<S, A>,
          grouped<S, A>, spread<S, A>,   tap_gradients<S, A>};
}

}  // namespace

SPECTRALX_END_TARGET
