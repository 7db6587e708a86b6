// noisy_topk_gating on its own: rows of [A, T, E] go through shared memory, so that reads and writes
// are coalesced and a thread has its row at hand.
#pragma once
#include "cuda/aomoa/router.cuh"

namespace spectralx::cuda {

struct GatingSizes {
  int attributes, tokens, experts, top_k;
};

constexpr int kGatingTiles = 8;  // [threads, stride] of the wide type that a block may need

// An odd stride keeps the rows of a warp in different banks.
__host__ __device__ constexpr int row_stride(int experts) { return experts | 1; }

template <typename S>
__device__ void fill_tile(const S* source, int64_t first, int values, int experts, Wide<S>* tile) {
  for (int i = threadIdx.x; i < values; i += blockDim.x)
    tile[i / experts * row_stride(experts) + i % experts] = wide(source[first + i]);
}

template <typename S>
__device__ void drain_tile(const Wide<S>* tile, int values, int experts, S* target, int64_t first) {
  if (target == nullptr) return;
  for (int i = threadIdx.x; i < values; i += blockDim.x)
    target[first + i] = narrow<S>(tile[i / experts * row_stride(experts) + i % experts]);
}

// Grid (blocks of blockDim.x tokens, attributes). partial [A, blocks, E]: the block's share of load.
template <typename S>
__global__ void gating_forward(const S* clean, const S* raw_std, const S* noise, GatingSizes s,
                               Wide<S>* gates, Wide<S>* partial) {
  using W = Wide<S>;
  const int stride = row_stride(s.experts), tile = blockDim.x * stride;
  W* clean_tile = reinterpret_cast<W*>(dynamic_shared());
  W *logits = clean_tile + tile, *std = logits + tile, *gate_tile = std + tile,
    *stays = gate_tile + tile;
  const int token = blockIdx.x * blockDim.x, rows = min(int(blockDim.x), s.tokens - token);
  const int values = rows * s.experts;
  const int64_t first = (int64_t(blockIdx.y) * s.tokens + token) * s.experts;
  fill_tile(clean, first, values, s.experts, clean_tile);
  if (noise != nullptr) {
    fill_tile(noise, first, values, s.experts, logits);
    fill_tile(raw_std, first, values, s.experts, std);
  }
  __syncthreads();
  const int row = threadIdx.x * stride;
  if (int(threadIdx.x) < rows) {
    for (int e = 0; e < s.experts && noise != nullptr; ++e) {
      std[row + e] = softplus(std[row + e]) + W(kNoiseFloor);
      logits[row + e] = clean_tile[row + e] + logits[row + e] * std[row + e];
    }
    gates_of_row<W>((noise != nullptr ? logits : clean_tile) + row, clean_tile + row,
                    noise != nullptr ? std + row : nullptr, s.experts, s.top_k, gate_tile + row,
                    stays + row);
  }
  __syncthreads();
  drain_tile<W>(gate_tile, values, s.experts, gates, first);
  for (int e = threadIdx.x; e < s.experts; e += blockDim.x) {
    W sum = 0;
    for (int i = 0; i < rows; ++i) sum += stays[i * stride + e];
    partial[(int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * s.experts + e] = sum;
  }
}

// Grid (attributes). load [A, E].
template <typename W>
__global__ void gating_load(const W* partial, int blocks, int experts, W* load) {
  ordered_sum(partial + int64_t(blockIdx.x) * blocks * experts, blocks, experts,
              load + int64_t(blockIdx.x) * experts, reinterpret_cast<W*>(dynamic_shared()));
}

// The same grid. gates_grad [A, T, E] and load_grad [A, E] may be null; so may the targets.
template <typename S>
__global__ void gating_backward(const Wide<S>* gates_grad, const Wide<S>* load_grad, const S* clean,
                                const S* raw_std, const S* noise, GatingSizes s, S* clean_grad,
                                S* raw_std_grad, S* noise_grad) {
  using W = Wide<S>;
  const int stride = row_stride(s.experts), tile = blockDim.x * stride;
  W* clean_tile = reinterpret_cast<W*>(dynamic_shared());
  W *logits = clean_tile + tile, *std = logits + tile, *raw = std + tile, *noise_tile = raw + tile,
    *shares = noise_tile + tile, *results = shares + tile, *raw_results = results + tile;
  const int token = blockIdx.x * blockDim.x, rows = min(int(blockDim.x), s.tokens - token);
  const int values = rows * s.experts;
  const int64_t first = (int64_t(blockIdx.y) * s.tokens + token) * s.experts;
  const bool noisy = noise != nullptr;
  fill_tile(clean, first, values, s.experts, clean_tile);
  if (noisy) {
    fill_tile(noise, first, values, s.experts, noise_tile);
    fill_tile(raw_std, first, values, s.experts, raw);
  }
  if (gates_grad != nullptr) fill_tile(gates_grad, first, values, s.experts, shares);
  __syncthreads();
  const int row = threadIdx.x * stride;
  if (int(threadIdx.x) < rows) {
    for (int e = 0; e < s.experts; ++e) {
      const W deviation = noisy ? softplus(raw[row + e]) + W(kNoiseFloor) : W(0);
      std[row + e] = deviation;
      logits[row + e] =
          noisy ? clean_tile[row + e] + noise_tile[row + e] * deviation : clean_tile[row + e];
    }
    const Routing<W> routing = route(logits + row, s.experts, s.top_k);
    for (int e = 0; e < s.experts; ++e) {
      const W logit = logits[row + e];
      const W gate = routing.takes(logit, e) ? routing.weight(logit) : W(0);
      const bool passes = gates_grad != nullptr && !(gate <= W(kGateFloor));
      shares[row + e] = passes ? gate * shares[row + e] : W(0);
    }
    route_backward<W>(logits + row, clean_tile + row, noisy ? std + row : nullptr, raw + row,
                      noise_tile + row, shares + row,
                      load_grad != nullptr ? load_grad + blockIdx.y * s.experts : nullptr,
                      s.experts, s.top_k, results + row, raw_results + row, shares + row);
  }
  __syncthreads();
  drain_tile<S>(results, values, s.experts, clean_grad, first);
  if (!noisy) return;
  drain_tile<S>(raw_results, values, s.experts, raw_std_grad, first);
  __syncthreads();
  for (int i = threadIdx.x; i < values; i += blockDim.x) {
    const int at = i / s.experts * stride + i % s.experts;
    shares[at] *= std[at];
  }
  __syncthreads();
  drain_tile<S>(shares, values, s.experts, noise_grad, first);
}

}  // namespace spectralx::cuda
