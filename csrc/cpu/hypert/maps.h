// Passes over channels-last maps between the stem's convolutions, on the calling thread.
//
// Compiled once for each instruction set (maps_*.cpp) and chosen at run time.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

// z = (x - mean) scale + shift, a channel each; [C].
template <typename A>
struct Affine {
  const A *mean, *scale, *shift;
};

// S is what maps hold, A what sums are formed in. Maps are dense [rows, channels].
template <typename S, typename A>
struct MapKernels {
  const char* instruction_set;

  // sum += x - shift, square += (x - shift)^2, over the rows.
  void (*add_moments)(const S* x, int64_t rows, int64_t channels, const A* shift, A* sum, A* square);

  // out = z, or skip + GELU(z) where skip is not null.
  void (*apply)(const S* x, const S* skip, int64_t rows, int64_t channels, Affine<A> affine, S* out);

  // With dz = grad, or grad GELU'(z): sum += dz, product += dz (x - mean), over the rows.
  void (*add_gradients)(const S* grad, const S* x, int64_t rows, int64_t channels, Affine<A> affine,
                        bool gelu, A* sum, A* product);

  // out = dz scale + (x - mean) slope + offset.
  void (*gradient)(const S* grad, const S* x, int64_t rows, int64_t channels, Affine<A> affine,
                   const A* slope, const A* offset, bool gelu, S* out);
};

// The best table this processor runs.
template <typename S, typename A>
const MapKernels<S, A>& map_kernels() {
  return best_table<MapKernels<S, A>, S>();
}

}  // namespace spectralx::cpu
