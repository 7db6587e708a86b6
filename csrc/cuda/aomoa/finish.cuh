// The end of backward, in one launch of five roles: norm1's share of x's gradient; the parts of the
// weights' gradients added up; what the vendor's products still need to become the gradients of
// `down`, norm1, `up` and `scaler`.
#pragma once
#include "cuda/aomoa/gradients.cuh"

namespace spectralx::cuda {

struct FinishSizes {
  int64_t rows;
  int attributes, width, out, rank, hidden, experts, splits;
  int x_blocks, part_blocks, down_blocks, norm_blocks;  // the rest: up
};

template <typename S>
struct FinishTensors {
  const S *x, *scaler, *norm1_weight, *norm1_bias, *down, *up;
  const Wide<S>*row_terms, *parts, *up_products, *down_products;
  S *x_grad, *scaler_grad, *norm1_weight_grad, *norm1_bias_grad, *down_grad, *norm2_weight_grad,
      *norm2_bias_grad, *gate_grad, *gate_noise_grad, *fc1_weight_grad, *fc1_bias_grad,
      *fc2_weight_grad, *fc2_bias_grad, *up_grad;
};

constexpr int kNormColumns = 32;  // of a block that sums norm1's gradients

template <typename S>
__device__ void add_row_terms(const FinishSizes& s, const FinishTensors<S>& t, int block) {
  using W = Wide<S>;
  constexpr int kSize = Pack<S>::kSize;
  const int64_t all = s.rows * s.width;
  const bool packs = (reinterpret_cast<uintptr_t>(t.x) | reinterpret_cast<uintptr_t>(t.x_grad)) %
                             16 == 0 && s.width % kSize == 0;
  const int64_t i = (int64_t(block) * kThreads + threadIdx.x) * kSize;
  if (i >= all) return;
  if (packs) {
    const W slope = t.row_terms[i / s.width * 2], shift = t.row_terms[i / s.width * 2 + 1];
    const Pack<S> x = *reinterpret_cast<const Pack<S>*>(t.x + i);
    Pack<S> grad = *reinterpret_cast<const Pack<S>*>(t.x_grad + i);
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      grad.values[j] = narrow<S>(wide(grad.values[j]) + slope * wide(x.values[j]) + shift);
    *reinterpret_cast<Pack<S>*>(t.x_grad + i) = grad;
    return;
  }
  for (int64_t n = i; n < min(i + kSize, all); ++n) {
    const W slope = t.row_terms[n / s.width * 2], shift = t.row_terms[n / s.width * 2 + 1];
    t.x_grad[n] = narrow<S>(wide(t.x_grad[n]) + slope * wide(t.x[n]) + shift);
  }
}

template <typename S>
__device__ void store(S* target, int64_t at, Wide<S> value) {
  if (target != nullptr) target[at] = narrow<S>(value);
}

template <typename W>
__device__ __forceinline__ W sum_parts(const W* parts, int splits, int64_t size, int64_t at) {
  W sum = 0;
  for (int split = 0; split < splits; ++split) sum += parts[split * size + at];
  return sum;
}

template <typename S>
__device__ void add_parts(const FinishSizes& s, const FinishTensors<S>& t, int block) {
  const PartLayout layout(s.attributes, s.rank, s.hidden, s.experts);
  const int64_t at = int64_t(block) * kThreads + threadIdx.x;
  if (at >= layout.norms + 2 * s.rank) return;
  const Wide<S> sum = sum_parts(t.parts, s.splits, layout.size, at);
  if (at < layout.fc1) {
    store(t.fc2_weight_grad, at, sum);
  } else if (at < layout.fc2_bias) {
    store(t.fc1_weight_grad, at - layout.fc1, sum);
  } else if (at < layout.fc1_bias) {
    store(t.fc2_bias_grad, at - layout.fc2_bias, sum);
  } else if (at < layout.router) {
    store(t.fc1_bias_grad, at - layout.fc1_bias, sum);
  } else if (at < layout.norms) {  // [A, 2 E, r] to two [A, r, E]
    const int64_t row = (at - layout.router) / s.rank, j = (at - layout.router) % s.rank;
    const int64_t a = row / (2 * s.experts), e = row % (2 * s.experts);
    S* target = e < s.experts ? t.gate_grad : t.gate_noise_grad;
    store(target, (a * s.rank + j) * s.experts + e % s.experts, sum);
  } else if (at < layout.norms + s.rank) {
    store(t.norm2_weight_grad, at - layout.norms, sum);
  } else {
    store(t.norm2_bias_grad, at - layout.norms - s.rank, sum);
  }
}

// A warp to a row j of down: gamma (products - sum of normed_grad mean1) + beta sum of z0's gradient.
template <typename S>
__device__ void finish_down(const FinishSizes& s, const FinishTensors<S>& t, int block) {
  using W = Wide<S>;
  const PartLayout layout(s.attributes, s.rank, s.hidden, s.experts);
  const int j = block * kWarps + threadIdx.x / 32;
  if (j >= s.rank) return;
  const W z0 = sum_parts(t.parts, s.splits, layout.size, layout.norms + 2 * int64_t(s.rank) + j);
  const W means = sum_parts(t.parts, s.splits, layout.size, layout.norms + 3 * int64_t(s.rank) + j);
  for (int i = threadIdx.x % 32; i < s.width; i += 32) {
    const int64_t at = int64_t(j) * s.width + i;
    t.down_grad[at] = narrow<S>(wide(t.norm1_weight[i]) * (t.down_products[at] - means) +
                                wide(t.norm1_bias[i]) * z0);
  }
}

// kNormColumns columns of norm1, the rank shared out among the warps.
template <typename S>
__device__ void finish_norm(const FinishSizes& s, const FinishTensors<S>& t, int block) {
  using W = Wide<S>;
  const PartLayout layout(s.attributes, s.rank, s.hidden, s.experts);
  W* sums = reinterpret_cast<W*>(dynamic_shared());  // [2, kWarps, kNormColumns]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = block * kNormColumns + lane;
  W weight = 0, bias = 0;
  for (int j = warp; j < s.rank; j += kWarps) {
    const int64_t at = layout.norms + 2 * int64_t(s.rank) + j;
    const W z0 = sum_parts(t.parts, s.splits, layout.size, at);
    const W means = sum_parts(t.parts, s.splits, layout.size, at + s.rank);
    if (i >= s.width) continue;
    const W down = wide(t.down[int64_t(j) * s.width + i]);
    weight += (t.down_products[int64_t(j) * s.width + i] - means) * down;
    bias += z0 * down;
  }
  sums[threadIdx.x] = weight;
  sums[kThreads + threadIdx.x] = bias;
  __syncthreads();
  if (warp > 0 || i >= s.width) return;
  weight = bias = 0;
  for (int w = 0; w < kWarps; ++w) {
    weight += sums[w * 32 + lane];
    bias += sums[kThreads + w * 32 + lane];
  }
  store(t.norm1_weight_grad, i, weight);
  store(t.norm1_bias_grad, i, bias);
}

// A warp to a row o of up.
template <typename S>
__device__ void finish_up(const FinishSizes& s, const FinishTensors<S>& t, int block) {
  using W = Wide<S>;
  const int o = block * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (o >= s.out) return;
  const int64_t plane = int64_t(s.out) * s.rank, start = int64_t(o) * s.rank;
  for (int j = lane; j < s.rank && t.up_grad != nullptr; j += 32) {
    W sum = 0;
    for (int a = 0; a < s.attributes; ++a)
      sum += wide(t.scaler[a * s.out + o]) * t.up_products[a * plane + start + j];
    t.up_grad[start + j] = narrow<S>(sum);
  }
  for (int a = 0; a < s.attributes && t.scaler_grad != nullptr; ++a) {
    W sum = 0;
    for (int j = lane; j < s.rank; j += 32)
      sum += wide(t.up[start + j]) * t.up_products[a * plane + start + j];
    sum = warp_sum(sum);
    if (lane == 0) t.scaler_grad[a * s.out + o] = narrow<S>(sum);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 4) finish(FinishSizes s, FinishTensors<S> t) {
  int block = blockIdx.x;
  if (block < s.x_blocks) return add_row_terms(s, t, block);
  block -= s.x_blocks;
  if (block < s.part_blocks) return add_parts(s, t, block);
  block -= s.part_blocks;
  if (block < s.down_blocks) return finish_down(s, t, block);
  block -= s.down_blocks;
  if (block < s.norm_blocks) return finish_norm(s, t, block);
  finish_up(s, t, block - s.norm_blocks);
}

}  // namespace spectralx::cuda
