// What the vendor's products need first, in one launch: row statistics of norm1, norm1 folded into
// `down`, `scaler` folded into `up`. Blocks take one of the three roles by their index.
#pragma once
#include "cuda/common/tile.cuh"

namespace spectralx::cuda {

struct PrepareSizes {
  int tokens, attributes, width, rank, out;  // width = in / A, out = out / A
  int row_blocks, fold_blocks;               // of kWarps rows each; the rest scale `up`
  double eps;
};

constexpr int kScaleElements = 8 * kThreads;  // of a block

// statistics [3, A, T] (planes 0 and 1 written; null in backward), folded [r, d] = gamma * down,
// column_sums [r] of folded, shift [r] = down beta, scaled_up [A, out, r] = scaler * up.
template <typename S>
__global__ void __launch_bounds__(kThreads, 4)
    prepare(const S* x, const S* gamma, const S* beta, const S* down, const S* up, const S* scaler,
            PrepareSizes s, Wide<S>* statistics, S* folded, Wide<S>* column_sums, Wide<S>* shift,
            S* scaled_up, int* counter) {
  using W = Wide<S>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int block = blockIdx.x;
  if (block == 0 && threadIdx.x == 0) *counter = 0;
  if (block < s.row_blocks) {
    const int64_t row = int64_t(block) * kWarps + warp;  // t A + a
    if (row >= int64_t(s.tokens) * s.attributes) return;
    const S* values = x + row * s.width;
    const bool packs =
        reinterpret_cast<uintptr_t>(x) % 16 == 0 && s.width % Pack<S>::kSize == 0;
    W sum = 0, squares = 0;
    for_row(values, s.width, packs, lane, [&](int, W v) { sum += v; });
    const W mean = warp_sum(sum) / W(s.width);
    for_row(values, s.width, packs, lane, [&](int, W v) { squares += (v - mean) * (v - mean); });
    const W variance = warp_sum(squares) / W(s.width);
    if (lane > 0) return;
    const int64_t plane = int64_t(s.attributes) * s.tokens;
    const int64_t at = row % s.attributes * s.tokens + row / s.attributes;
    statistics[at] = mean;
    statistics[plane + at] = reciprocal_root(variance + W(s.eps));
    return;
  }
  block -= s.row_blocks;
  if (block < s.fold_blocks) {
    const int row = block * kWarps + warp;
    if (row >= s.rank) return;
    const int64_t first = int64_t(row) * s.width;
    W sum = 0, moved = 0;
    for (int i = lane; i < s.width; i += 32) {
      const W weight = wide(down[first + i]);
      const S product = narrow<S>(wide(gamma[i]) * weight);
      folded[first + i] = product;
      sum += wide(product);  // of what the product will use
      moved += wide(beta[i]) * weight;
    }
    sum = warp_sum(sum);
    moved = warp_sum(moved);
    if (lane == 0) {
      column_sums[row] = sum;
      shift[row] = moved;
    }
    return;
  }
  block -= s.fold_blocks;
  const int64_t plane = int64_t(s.out) * s.rank, all = plane * s.attributes;
  const int64_t first = int64_t(block) * kScaleElements;
  for (int64_t i = first + threadIdx.x; i < min(first + kScaleElements, all); i += kThreads)
    scaled_up[i] = narrow<S>(wide(scaler[i / s.rank]) * wide(up[i % plane]));
}

}  // namespace spectralx::cuda
