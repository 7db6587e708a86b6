// What the launches of this room share: sizes and weights from the arguments, the tile's height.
#pragma once
#include "cuda/aomoa/kernels.h"
#include "cuda/aomoa/mixture.cuh"
#include "cuda/common/dispatch.h"

namespace spectralx::cuda {

// Sizes with the tallest tile for which two blocks fit a multiprocessor, or one where two never do;
// narrower chunks next, and less than 16 rows, which waste tensor cores, only where nothing else fits.
// Shorter where there would be too few blocks to fill a GPU. A tile that the caller chose stays.
// `tile` is 0 where nothing fits.
template <typename Bytes>
MixtureSizes mixture_sizes(const SpectralxAomoa& layer, Bytes bytes) {
  constexpr int kMultiprocessors = 128;
  const int wanted = static_cast<int>(layer.tile);
  MixtureSizes s{static_cast<int>(layer.tokens),
                 static_cast<int>(layer.attributes),
                 static_cast<int>(layer.rank),
                 static_cast<int>(layer.hidden),
                 static_cast<int>(layer.experts),
                 static_cast<int>(layer.top_k),
                 0,
                 0,
                 layer.dense != 0,
                 layer.noise != nullptr};
  struct Round {
    int64_t budget;
    int shortest;
  };
  for (const auto& [budget, shortest] :
       {Round{kSharedBudget, 16}, Round{kSharedLimit, 16}, Round{kSharedLimit, 1}}) {
    for (s.chunk = kChunk; s.chunk >= 16; s.chunk /= 2) {
      for (s.tile = 64; s.tile >= shortest; s.tile /= 2) {
        const bool short_enough = s.tile <= 16 || ceil_div(s.rows(), s.tile) >= kMultiprocessors;
        if ((wanted == 0 ? short_enough : s.tile == wanted) && bytes(s) <= budget) return s;
      }
      if (budget == kSharedBudget) break;
    }
  }
  s.tile = 0;
  return s;
}

template <typename S>
MixtureWeights<S> mixture_weights(const SpectralxAomoa& layer) {
  return {as<S>(layer.gate),     as<S>(layer.gate_noise), as<Wide<S>>(layer.noise),
          as<S>(layer.fc1_weight), as<S>(layer.fc1_bias),   as<S>(layer.fc2_weight),
          as<S>(layer.fc2_bias)};
}

}  // namespace spectralx::cuda
