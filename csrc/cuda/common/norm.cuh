// Statistics of the channels of rows [rows, C], and batch norm with an activation on them, there and
// back.
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

template <typename S>
struct NormPass {
  int64_t rows;
  int channels, packs;
  bool active;  // whether the activation runs
  Wide<S> eps;
  const S *x, *grad, *skip;
  const Wide<S> *moments, *weight, *scale, *bias, *totals;
  S* out;
};

// Batch norm of N channels: (x - mean) * scale + bias; x without moments.
template <typename S, int N>
struct Normed {
  using W = Wide<S>;
  W mean[N], rstd[N], scale[N], bias[N];

  __device__ __forceinline__ Normed(const NormPass<S>& p, int c) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      mean[j] = p.moments ? p.moments[c + j] : W(0);
      rstd[j] = p.moments ? W(1) / sqrt(p.moments[p.channels + c + j] + p.eps) : W(1);
      scale[j] = p.scale ? p.scale[c + j] : p.weight ? rstd[j] * p.weight[c + j] : rstd[j];
      bias[j] = p.bias ? p.bias[c + j] : W(0);
    }
  }
  __device__ __forceinline__ W of(W x, int j) const { return (x - mean[j]) * scale[j] + bias[j]; }
};

// Activations of z, and the gradient of z for that of what they give.
struct Relu {
  template <typename W>
  __device__ static W of(W z) {
    return z < W(0) ? W(0) : z;  // NaN stays
  }
  template <typename W>
  __device__ static W back(W grad, W z) {
    return z <= W(0) ? W(0) : grad;
  }
};
struct Gelu {
  template <typename W>
  __device__ static W of(W z) {
    return z * normal_cdf(z);
  }
  template <typename W>
  __device__ static W back(W grad, W z) {
    return grad * (normal_cdf(z) + z * normal_pdf(z));
  }
};

template <typename Activation, typename S, int N>
__global__ void __launch_bounds__(kTile) normalize(NormPass<S> p) {
  using W = Wide<S>;
  const RowTask<N> task(p.packs, kNormRows, p.rows);
  if (task.c >= p.channels) return;
  const Normed<S, N> norm(p, task.c);
  for (int64_t i = task.begin + task.lane; i < task.end; i += task.lanes) {
    const int64_t at = i * p.channels + task.c;
    W values[N], more[N] = {};
    load<S, N>(p.x + at, values);
    if (p.skip) load<S, N>(p.skip + at, more);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const W z = norm.of(values[j], j);
      values[j] = (p.active ? Activation::of(z) : z) + more[j];
    }
    store<S, N>(p.out + at, values);
  }
}

// parts [blocks, 2, C]: the sums of dz and of dz times x as normalised.
template <typename Activation, typename S, int N>
__global__ void __launch_bounds__(kTile)
    norm_parts(NormPass<S> p, int64_t share, Wide<S>* parts) {
  using W = Wide<S>;
  W* shared = reinterpret_cast<W*>(dynamic_shared());  // [kTile, 2, N]
  const RowTask<N> task(p.packs, share, p.rows);
  const int c = task.c, channels = p.channels;
  W sums[N] = {}, dots[N] = {};
  if (c < channels) {
    const Normed<S, N> norm(p, c);
    for (int64_t i = task.begin + task.lane; i < task.end; i += task.lanes) {
      W values[N], grads[N];
      load<S, N>(p.x + i * channels + c, values);
      load<S, N>(p.grad + i * channels + c, grads);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const W dz = p.active ? Activation::back(grads[j], norm.of(values[j], j)) : grads[j];
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
template <typename Activation, typename S, int N>
__global__ void __launch_bounds__(kTile) norm_gradient(NormPass<S> p) {
  using W = Wide<S>;
  const RowTask<N> task(p.packs, kNormRows, p.rows);
  const int c = task.c;
  if (c >= p.channels) return;
  const Normed<S, N> norm(p, c);
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
      const W dz = p.active ? Activation::back(grads[j], norm.of(values[j], j)) : grads[j];
      values[j] = norm.scale[j] * (dz - off[j] - (values[j] - norm.mean[j]) * slope[j]);
    }
    store<S, N>(p.out + i * p.channels + c, values);
  }
}

// total [channels]: the parts [count, channels] in a fixed order. A block takes kTotalled channels, its
// lanes every so many parts each.
constexpr int kTotalled = 8;
template <typename W>
__global__ void __launch_bounds__(kTile)
    channel_total(const W* parts, int count, int channels, W* total) {
  W* shared = reinterpret_cast<W*>(dynamic_shared());  // [kTile]
  constexpr int kLanes = kTile / kTotalled;
  const int lane = threadIdx.x / kTotalled;
  const int c = blockIdx.x * kTotalled + threadIdx.x % kTotalled;
  W sum = 0;
  for (int i = lane; c < channels && i < count; i += kLanes) sum += parts[int64_t(i) * channels + c];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (lane > 0 || c >= channels) return;
  for (int k = 1; k < kLanes; ++k) sum += shared[threadIdx.x + k * kTotalled];
  total[c] = sum;
}

// Launches it.
template <typename W>
int launch_total(const W* parts, int64_t count, int64_t channels, W* total, cudaStream_t on) {
  return SPECTRALX_LAUNCH((channel_total<W>),
                          static_cast<unsigned>(ceil_div(channels, int64_t(kTotalled))), kTile,
                          kTile * sizeof(W), on, parts, static_cast<int>(count),
                          static_cast<int>(channels), total);
}

}  // namespace spectralx::cuda
