// From the down product to the mixture: norm2, router, gates, load, experts and their log-sum-exp,
// in one launch. Between x and the output only `mixed` [T, A, r] leaves the chip.
#pragma once
#include "cuda/aomoa/mixture.cuh"

namespace spectralx::cuda {

constexpr double kLogEpsilon = -36.04365338911715;  // a row that no expert takes

template <typename S>
struct ForwardTensors {
  const Wide<S>*products, *column_sums, *shift;  // x folded^T [T, A, r]; [r]; [r]
  const S *gamma, *beta;                         // norm2
  Wide<S>*statistics, *normed, *gates, *load;
  S* mixed;
  Wide<S>* partial;  // [blocks, A, E]
  int* counter;      // 0
};

template <typename S>
__host__ __device__ int forward_shared(const MixtureSizes& s) {
  const MixtureLayout<S> layout(s);
  const int state = MixtureLayout<S>::template bytes<Wide<S>>(2 * s.tile * s.state_stride());
  return layout.hidden + layout.staged + layout.router + layout.lists + max(layout.z, state);
}

// norm2 of the tile: z in shared memory, its normed values and rstd in global memory.
template <typename S>
__device__ void second_norm(const Mixture<S>& m, const ForwardTensors<S>& t, Wide<S> eps) {
  using W = Wide<S>;
  const MixtureSizes& s = m.s;
  const int64_t plane = int64_t(s.attributes) * s.tokens;
  const int lane = threadIdx.x % 32, padded = static_cast<int>(round_up(s.rank, 16));
  for (int row = threadIdx.x / 32; row < m.rows; row += kWarps) {
    const int64_t at = m.position(row), start = (m.first + row) * s.rank;
    const W mean1 = t.statistics[at], rstd1 = t.statistics[plane + at];
    const auto z0 = [&](int j) {
      return rstd1 * (t.products[start + j] - mean1 * t.column_sums[j]) + t.shift[j];
    };
    W sum = 0, squares = 0;
    for (int j = lane; j < s.rank; j += 32) sum += z0(j);
    const W mean = warp_sum(sum) / W(s.rank);
    for (int j = lane; j < s.rank; j += 32) squares += (z0(j) - mean) * (z0(j) - mean);
    const W rstd = reciprocal_root(warp_sum(squares) / W(s.rank) + eps);
    for (int j = lane; j < padded; j += 32) {
      W value = 0;
      if (j < s.rank) {
        const W normed = (z0(j) - mean) * rstd;
        t.normed[start + j] = normed;
        value = normed * wide(t.gamma[j]) + wide(t.beta[j]);
      }
      m.z[row * m.z_stride() + j] = narrow<S>(value);
    }
    if (lane == 0) t.statistics[2 * plane + at] = rstd;
  }
}

// One more term of a running log-sum-exp: log(total) + peak.
template <typename W>
__device__ __forceinline__ void add_term(W term, W& peak, W& total) {
  if (term > peak) {
    total = total * exponential(peak - term) + W(1);
    peak = term;
  } else {
    total += exponential(term - peak);
  }
}

template <typename W>
__device__ __forceinline__ W log_total(W peak, W total) {
  return total == W(0) ? W(kLogEpsilon) : peak + logarithm(total);
}

template <typename S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 2)
    mixture_forward(MixtureSizes s, MixtureWeights<S> weights, ForwardTensors<S> t, double eps) {
  using W = Wide<S>;
  const Mixture<S> m(s, weights, dynamic_shared());
  second_norm(m, t, W(eps));
  __syncthreads();
  m.score(t.normed, t.gamma, t.beta);
  __syncthreads();
  if (int(threadIdx.x) < m.rows) {
    const int at = threadIdx.x * s.stride();
    gates_of_row<W>(m.logits + at, m.clean + at, s.noisy ? m.deviation + at : nullptr, s.experts,
                    s.top_k, m.gates + at, m.raw + at);
    for (int e = 0; e < s.experts; ++e) m.logits[at + e] = logarithm(m.gates[at + e]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < m.rows * s.experts; i += kThreads) {
    const int row = i / s.experts, e = i % s.experts;
    t.gates[m.position(row) * s.experts + e] = m.gates[row * s.stride() + e];
  }
  const int slots = s.attributes * s.experts;
  for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
    const int a = slot / s.experts, begin = (a - m.attribute(0) + s.attributes) % s.attributes;
    W sum = 0;
    for (int row = begin; row < m.rows; row += s.attributes)
      sum += m.raw[row * s.stride() + slot % s.experts];
    t.partial[int64_t(blockIdx.x) * slots + slot] = sum;
  }
  m.group();
  m.hidden_layer();

  W *peaks = reinterpret_cast<W*>(m.z), *totals = peaks + s.tile * s.state_stride();
  for (int c0 = 0; c0 < s.rank; c0 += s.chunk) {
    const int columns = min(s.chunk, s.rank - c0);
    for (int i = threadIdx.x; i < s.tile * s.state_stride(); i += kThreads) {
      peaks[i] = W(-INFINITY);
      totals[i] = 0;
    }
    for (int e = 0; e < s.experts; ++e) {
      if (m.count(e) == 0) continue;
      m.output_layer(e, c0, columns, [&](int place, int column, W y) {
        const int row = m.listed(e, place), at = row * s.state_stride() + column;
        if (m.gates[row * s.stride() + e] != W(0))
          add_term(y + m.logits[row * s.stride() + e], peaks[at], totals[at]);
      });
    }
    __syncthreads();
    for (int i = threadIdx.x; i < m.rows * columns; i += kThreads) {
      const int row = i / columns, column = i % columns, at = row * s.state_stride() + column;
      t.mixed[(m.first + row) * s.rank + c0 + column] =
          narrow<S>(log_total(peaks[at], totals[at]));
    }
    __syncthreads();
  }

  // The last block to come adds the blocks' loads up, in their order.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    m.offsets[0] = atomicAdd(t.counter, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (m.offsets[0] == 0) return;
  __threadfence();
  ordered_sum(t.partial, gridDim.x, slots, t.load, reinterpret_cast<W*>(m.staged));
}

}  // namespace spectralx::cuda
