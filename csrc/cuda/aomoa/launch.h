// What the launches of this room share: sizes and weights from the arguments, the tile's height.
#pragma once
#include "cuda/aomoa/kernels.h"
#include "cuda/aomoa/mixture.cuh"
#include "cuda/common/dispatch.h"

namespace spectralx::cuda {

template <typename T>
T* as(void* pointer) {
  return static_cast<T*>(pointer);
}
template <typename T>
const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

// Sizes with the tallest tile for which two blocks fit a multiprocessor, or one where two never do;
// shorter where there would be too few blocks to fill a GPU. `tile` is 0 where nothing fits.
template <typename Bytes>
MixtureSizes mixture_sizes(const SpectralxAomoa& layer, Bytes bytes) {
  MixtureSizes s{static_cast<int>(layer.tokens), static_cast<int>(layer.attributes),
                 static_cast<int>(layer.rank),   static_cast<int>(layer.hidden),
                 static_cast<int>(layer.experts), static_cast<int>(layer.top_k),
                 0,                               layer.dense != 0,
                 layer.noise != nullptr};
  constexpr int kMultiprocessors = 128;
  for (const int64_t budget : {kSharedBudget, kSharedLimit}) {
    for (int tile = 64; tile >= 16; tile /= 2) {
      s.tile = tile;
      if (bytes(s) > budget) continue;
      if (tile > 16 && ceil_div(s.rows(), tile) < kMultiprocessors) continue;
      return s;
    }
  }
  s.tile = 0;
  return s;
}

template <typename S>
MixtureWeights<S> mixture_weights(const SpectralxAomoa& layer) {
  return {as<S>(layer.gate),     as<S>(layer.gate_noise), as<S>(layer.noise),
          as<S>(layer.fc1_weight), as<S>(layer.fc1_bias),  as<S>(layer.fc2_weight),
          as<S>(layer.fc2_bias)};
}

}  // namespace spectralx::cuda
