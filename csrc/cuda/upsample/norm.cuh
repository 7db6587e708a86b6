// Statistics of the channels of rows [rows, C], and batch norm with ReLU on them, there and back.
//
// A block is kTile threads: `packs` packs of channels side by side, times lanes that take rows in
// turn. A part is a fixed run of rows; parts are joined in order by a second launch.
#pragma once
#include "cuda/common/scalar.cuh"

namespace spectralx::cuda {

constexpr int kTile = 128;     // threads of a block
constexpr int kNormRows = 32;  // rows of a block in passes that keep nothing
constexpr int kJoined = 128;   // parts that one thread joins

template <typename S, int N>
__device__ __forceinline__ void load(const S* at, Wide<S> (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = wide(*at);
  } else {
    static_assert(N == Pack<S>::kSize);
    const Pack<S> pack = *reinterpret_cast<const Pack<S>*>(at);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = wide(pack.values[i]);
  }
}

template <typename S, int N>
__device__ __forceinline__ void store(S* at, const Wide<S> (&values)[N]) {
  if constexpr (N == 1) {
    *at = narrow<S>(values[0]);
  } else {
    Pack<S> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = narrow<S>(values[i]);
    *reinterpret_cast<Pack<S>*>(at) = pack;
  }
}

// Mean and squared deviations by part, [parts, 2, C], and values in each, [parts].
template <typename W>
struct MomentParts {
  W *values, *counts;
};

// n values of mean and squared deviations, and more of them.
template <typename W>
__device__ __forceinline__ void merge(W& n, W& mean, W& squares, W more, W more_mean,
                                      W more_squares) {
  if (more == W(0)) return;
  const W total = n + more, delta = more_mean - mean;
  mean += delta * (more / total);
  squares += more_squares + delta * delta * (n * more / total);
  n = total;
}

// Where a thread is: its first channel, its first row and the distance to the next.
template <int N>
struct RowTask {
  int c, lane, lanes;
  int64_t begin, end;

  __device__ RowTask(int packs, int64_t share, int64_t rows) {
    const int tid = threadIdx.x;
    lanes = kTile / packs, lane = tid / packs;
    c = (static_cast<int>(blockIdx.y) * packs + tid % packs) * N;
    begin = min(blockIdx.x * share, rows), end = min(begin + share, rows);
  }
};

template <typename S, int N>
__global__ void __launch_bounds__(kTile)
    moment_parts(const S* x, int64_t rows, int64_t share, int channels, int packs,
                 MomentParts<Wide<S>> parts) {
  using W = Wide<S>;
  W* shared = reinterpret_cast<W*>(dynamic_shared());  // [kTile, 2, N]
  const RowTask<N> task(packs, share, rows);
  const int c = task.c;
  W mean[N] = {}, squares[N] = {};
  W n = 0;
  for (int64_t i = task.begin + task.lane; c < channels && i < task.end; i += task.lanes) {
    W values[N];
    load<S, N>(x + i * channels + c, values);
    n += W(1);
    const W step = W(1) / n;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const W delta = values[j] - mean[j];
      mean[j] += delta * step;
      squares[j] += delta * (values[j] - mean[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    shared[threadIdx.x * 2 * N + j] = mean[j];
    shared[(threadIdx.x * 2 + 1) * N + j] = squares[j];
  }
  __syncthreads();
  if (task.lane > 0 || c >= channels) return;
  const int64_t count = task.end - task.begin;
  W* to = parts.values + int64_t(blockIdx.x) * 2 * channels + c;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    W all = n;
    for (int k = 1; k < task.lanes; ++k) {
      const int other = threadIdx.x + k * packs;
      const W more = k < count ? W((count - k + task.lanes - 1) / task.lanes) : W(0);
      merge(all, mean[j], squares[j], more, shared[other * 2 * N + j],
            shared[(other * 2 + 1) * N + j]);
    }
    to[j] = mean[j];
    to[channels + j] = squares[j];
  }
  if (c == 0) parts.counts[blockIdx.x] = W(count);
}

// out: groups of `share` parts, in order; with kFinal one group, as mean and biased variance.
template <typename W, bool kFinal>
__global__ void join_moments(MomentParts<W> parts, int64_t count, int64_t share, int channels,
                             MomentParts<W> out) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const int64_t begin = blockIdx.y * share, end = min(begin + share, count);
  W n = 0, mean = 0, squares = 0;
  for (int64_t i = begin; i < end; ++i) {
    const W* from = parts.values + i * 2 * channels + c;
    merge(n, mean, squares, parts.counts[i], from[0], from[channels]);
  }
  W* to = out.values + int64_t(blockIdx.y) * 2 * channels + c;
  to[0] = mean;
  to[channels] = kFinal ? squares / max(n, W(1)) : squares;
  if (!kFinal && c == 0) out.counts[blockIdx.y] = n;
}

// Batch norm of N channels: (x - mean) * scale + bias.
template <typename W, int N>
struct Normed {
  W mean[N], rstd[N], scale[N], bias[N];

  __device__ __forceinline__ Normed(const W* moments, const W* weight, const W* offset, W eps,
                                    int channels, int c) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      mean[j] = moments[c + j];
      rstd[j] = W(1) / sqrt(moments[channels + c + j] + eps);
      scale[j] = weight ? rstd[j] * weight[c + j] : rstd[j];
      bias[j] = offset ? offset[c + j] : W(0);
    }
  }
  __device__ __forceinline__ W of(W x, int j) const { return (x - mean[j]) * scale[j] + bias[j]; }
};

template <typename S>
struct NormPass {
  int64_t rows;
  int channels, packs;
  bool relu;
  Wide<S> eps;
  const S *x, *grad;
  const Wide<S> *moments, *weight, *bias, *totals;
  S* out;
};

template <typename S, int N>
__global__ void __launch_bounds__(kTile) normalize(NormPass<S> p) {
  using W = Wide<S>;
  const RowTask<N> task(p.packs, kNormRows, p.rows);
  if (task.c >= p.channels) return;
  const Normed<W, N> norm(p.moments, p.weight, p.bias, p.eps, p.channels, task.c);
  for (int64_t i = task.begin + task.lane; i < task.end; i += task.lanes) {
    W values[N];
    load<S, N>(p.x + i * p.channels + task.c, values);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const W value = norm.of(values[j], j);
      values[j] = p.relu && value < W(0) ? W(0) : value;  // NaN stays
    }
    store<S, N>(p.out + i * p.channels + task.c, values);
  }
}

// parts [blocks, 2, C]: the sums of dz and of dz times x as normalised.
template <typename S, int N>
__global__ void __launch_bounds__(kTile)
    norm_parts(NormPass<S> p, int64_t share, Wide<S>* parts) {
  using W = Wide<S>;
  W* shared = reinterpret_cast<W*>(dynamic_shared());  // [kTile, 2, N]
  const RowTask<N> task(p.packs, share, p.rows);
  const int c = task.c, channels = p.channels;
  W sums[N] = {}, dots[N] = {};
  if (c < channels) {
    const Normed<W, N> norm(p.moments, p.weight, p.bias, p.eps, channels, c);
    for (int64_t i = task.begin + task.lane; i < task.end; i += task.lanes) {
      W values[N], grads[N];
      load<S, N>(p.x + i * channels + c, values);
      load<S, N>(p.grad + i * channels + c, grads);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const W dz = p.relu && norm.of(values[j], j) <= W(0) ? W(0) : grads[j];
        sums[j] += dz;
        dots[j] += dz * (values[j] - norm.mean[j]) * norm.rstd[j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    shared[threadIdx.x * 2 * N + j] = sums[j];
    shared[(threadIdx.x * 2 + 1) * N + j] = dots[j];
  }
  __syncthreads();
  if (task.lane > 0 || c >= channels) return;
  W* to = parts + int64_t(blockIdx.x) * 2 * channels + c;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    for (int k = 1; k < task.lanes; ++k) {
      const int other = threadIdx.x + k * p.packs;
      sums[j] += shared[other * 2 * N + j];
      dots[j] += shared[(other * 2 + 1) * N + j];
    }
    to[j] = sums[j];
    to[channels + j] = dots[j];
  }
}

// out = scale (dz - mean of dz - x as normalised * mean of dz times that); without totals scale dz.
template <typename S, int N>
__global__ void __launch_bounds__(kTile) norm_gradient(NormPass<S> p) {
  using W = Wide<S>;
  const RowTask<N> task(p.packs, kNormRows, p.rows);
  const int c = task.c;
  if (c >= p.channels) return;
  const Normed<W, N> norm(p.moments, p.weight, p.bias, p.eps, p.channels, c);
  W off[N] = {}, slope[N] = {};
  if (p.totals) {
    const W share = W(1) / W(p.rows);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      off[j] = p.totals[c + j] * share;
      slope[j] = p.totals[p.channels + c + j] * share * norm.rstd[j];
    }
  }
  for (int64_t i = task.begin + task.lane; i < task.end; i += task.lanes) {
    W values[N], grads[N];
    load<S, N>(p.x + i * p.channels + c, values);
    load<S, N>(p.grad + i * p.channels + c, grads);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const W dz = p.relu && norm.of(values[j], j) <= W(0) ? W(0) : grads[j];
      values[j] = norm.scale[j] * (dz - off[j] - (values[j] - norm.mean[j]) * slope[j]);
    }
    store<S, N>(p.out + i * p.channels + c, values);
  }
}

// total [channels]: the parts in order.
template <typename W>
__global__ void channel_total(const W* parts, int count, int channels, W* total) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  W sum = 0;
  for (int i = 0; i < count; ++i) sum += parts[int64_t(i) * channels + c];
  total[c] = sum;
}

}  // namespace spectralx::cuda
