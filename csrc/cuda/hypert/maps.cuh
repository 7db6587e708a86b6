// The table of a batch norm, and images with a channel of ones, for the stem. Its other passes are
// those of common/norm.cuh.
#pragma once
#include "cuda/common/norm.cuh"

namespace spectralx::cuda {

// Rows 2 and 3 of table [4, C], scale and shift, from its rows 0 and 1, mean and variance.
template <typename S>
__global__ void __launch_bounds__(kTile)
    norm_table(const S* weight, const S* bias, int channels, Wide<S> eps, Wide<S>* table) {
  const int c = blockIdx.x * kTile + threadIdx.x;
  if (c >= channels) return;
  table[2 * channels + c] = wide(weight[c]) / sqrt(table[channels + c] + eps);
  table[3 * channels + c] = wide(bias[c]);
}

constexpr int kOnesPixels = 64;    // of a block
constexpr int kOnesChannels = 64;  // that lie in shared memory at once

// out [B, pixels, channels] from images [B, bands, pixels]: ones behind the bands, then zeros. Planes
// are read along the pixels and rows written along the channels, by way of shared memory.
template <typename S>
__global__ void __launch_bounds__(kTile)
    with_ones(const S* images, int64_t pixels, int bands, int channels, S* out) {
  S* tile = reinterpret_cast<S*>(dynamic_shared());  // [kOnesChannels, kOnesPixels + 1]
  const int64_t first = int64_t(blockIdx.x) * kOnesPixels;
  const int count = static_cast<int>(min(int64_t(kOnesPixels), pixels - first));
  images += blockIdx.y * bands * pixels + first;
  out += (blockIdx.y * pixels + first) * channels;
  for (int c0 = 0; c0 < channels; c0 += kOnesChannels) {
    const int width = min(kOnesChannels, channels - c0);
    for (int i = threadIdx.x; i < width * kOnesPixels; i += kTile) {
      const int c = i / kOnesPixels, pixel = i % kOnesPixels;
      S value = narrow<S>(c0 + c == bands ? 1 : 0);
      if (c0 + c < bands && pixel < count) value = images[(c0 + c) * pixels + pixel];
      tile[c * (kOnesPixels + 1) + pixel] = value;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * width; i += kTile) {
      const int pixel = i / width, c = i % width;
      out[int64_t(pixel) * channels + c0 + c] = tile[c * (kOnesPixels + 1) + pixel];
    }
    __syncthreads();
  }
}

}  // namespace spectralx::cuda
