// The kernels of maps.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another.
#include <bit>
#include <cmath>
#include <cstdint>

#include "cpu/hypert/maps.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/normal.h"
#include "cpu/common/storage.h"

namespace {

using c10::BFloat16;
using spectralx::cpu::Affine;
using spectralx::cpu::MapKernels;

template <typename S, typename A>
void add_moments(const S* x, int64_t rows, int64_t channels, const A* shift, A* sum, A* square) {
  for (int64_t row = 0; row < rows; ++row, x += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A d = widen(x[c]) - shift[c];
      sum[c] += d;
      square[c] += d * d;
    }
  }
}

template <typename S, typename A>
void apply(const S* x, const S* skip, int64_t rows, int64_t channels, Affine<A> affine, S* out) {
  const A *mean = affine.mean, *scale = affine.scale, *shift = affine.shift;
  for (int64_t row = 0; row < rows; ++row, x += channels, out += channels) {
    if (skip == nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        store((widen(x[c]) - mean[c]) * scale[c] + shift[c], out[c]);
      }
      continue;
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A z = (widen(x[c]) - mean[c]) * scale[c] + shift[c];
      store(widen(skip[c]) + z * normal(z).below, out[c]);
    }
    skip += channels;
  }
}

template <bool kGelu, typename A>
inline A through(A grad, A z) {
  if constexpr (!kGelu) return grad;
  const Normal<A> at = normal(z);
  return grad * (at.below + z * at.density);
}

template <bool kGelu, typename S, typename A>
void add_gradients_of(const S* grad, const S* x, int64_t rows, int64_t channels, Affine<A> affine,
                      A* sum, A* product) {
  const A *mean = affine.mean, *scale = affine.scale, *shift = affine.shift;
  for (int64_t row = 0; row < rows; ++row, grad += channels, x += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A d = widen(x[c]) - mean[c];
      const A dz = through<kGelu>(widen(grad[c]), d * scale[c] + shift[c]);
      sum[c] += dz;
      product[c] += dz * d;
    }
  }
}

template <typename S, typename A>
void add_gradients(const S* grad, const S* x, int64_t rows, int64_t channels, Affine<A> affine,
                   bool gelu, A* sum, A* product) {
  const auto run = gelu ? add_gradients_of<true, S, A> : add_gradients_of<false, S, A>;
  run(grad, x, rows, channels, affine, sum, product);
}

template <bool kGelu, typename S, typename A>
void gradient_of(const S* grad, const S* x, int64_t rows, int64_t channels, Affine<A> affine,
                 const A* slope, const A* offset, S* out) {
  const A *mean = affine.mean, *scale = affine.scale, *shift = affine.shift;
  for (int64_t row = 0; row < rows; ++row, grad += channels, x += channels, out += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A d = widen(x[c]) - mean[c];
      const A dz = through<kGelu>(widen(grad[c]), d * scale[c] + shift[c]);
      store(dz * scale[c] + d * slope[c] + offset[c], out[c]);
    }
  }
}

template <typename S, typename A>
void gradient(const S* grad, const S* x, int64_t rows, int64_t channels, Affine<A> affine,
              const A* slope, const A* offset, bool gelu, S* out) {
  const auto run = gelu ? gradient_of<true, S, A> : gradient_of<false, S, A>;
  run(grad, x, rows, channels, affine, slope, offset, out);
}

template <typename S, typename A>
constexpr MapKernels<S, A> table(const char* name) {
  return {name, add_moments<S, A>, apply<S, A>, add_gradients<S, A>, gradient<S, A>};
}

}  // namespace

SPECTRALX_END_TARGET
