// Rows of tokens: layer norm at gathered places and back, sums by token, the weighted halves. A warp
// takes a row where a row is summed, a thread a column where columns are.
#pragma once
#include "cuda/common/matches.cuh"

namespace spectralx::cuda {

constexpr int kRowWarps = 8;
constexpr int kRowThreads = 32 * kRowWarps;
constexpr int kNormRows = 2 * kRowWarps;  // of a block of norm_rows_backward

// tokens [B, count, width] by strides, weight and bias of the norm.
template <typename S>
struct NormedRows {
  const S *tokens, *weight, *bias;
  int64_t by_image, by_row;
  int count, width;
  Wide<S> eps;
  bool packs;  // 16-byte loads

  __device__ const S* row(int64_t image, int64_t token) const {
    return tokens + image * by_image + token * by_row;
  }
};

template <typename W>
struct Moments {
  W mean, rstd;
};

template <typename S>
__device__ __forceinline__ Moments<Wide<S>> moments(const NormedRows<S>& r, const S* row,
                                                    int lane) {
  using W = Wide<S>;
  W sum = 0, squares = 0;
  for_row(row, r.width, r.packs, lane, [&](int, W value) { sum += value; });
  const W mean = warp_sum(sum) / static_cast<W>(r.width);
  for_row(row, r.width, r.packs, lane,
          [&](int, W value) { squares += (value - mean) * (value - mean); });
  return {mean, reciprocal_root(warp_sum(squares) / static_cast<W>(r.width) + r.eps)};
}

// out [total, width], `keys` rows an image: the normed token at match or, without it, each token.
template <typename S>
__global__ void __launch_bounds__(kRowThreads)
    norm_rows(NormedRows<S> r, const int64_t* match, int64_t total, int keys, S* out) {
  using W = Wide<S>;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (row >= total) return;  // the whole warp
  const S* from = r.row(row / keys, match != nullptr ? match[row] : row % keys);
  const Moments<W> m = moments(r, from, lane);
  S* to = out + row * r.width;
  for_row(from, r.width, r.packs, lane, [&](int i, W value) {
    to[i] = narrow<S>((value - m.mean) * m.rstd * wide(r.weight[i]) + wide(r.bias[i]));
  });
}

// From grad [total, width]: tokens_grad, and of kNormRows rows the shares of weight and bias, parts
// [blocks, 2, width].
template <typename S>
__global__ void __launch_bounds__(kRowThreads)
    norm_rows_backward(NormedRows<S> r, const Wide<S>* grad, int64_t total, S* tokens_grad,
                       Wide<S>* parts) {
  using W = Wide<S>;
  auto* kept = reinterpret_cast<Moments<W>*>(dynamic_shared());  // [kNormRows]
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t(blockIdx.x) * kNormRows;
  const int rows = static_cast<int>(min(int64_t(kNormRows), total - first));
  for (int n = threadIdx.x / 32; n < rows; n += kRowWarps) {
    const int64_t row = first + n;
    const S* from = r.row(row / r.count, row % r.count);
    const W* upstream = grad + row * r.width;
    const Moments<W> m = moments(r, from, lane);
    if (lane == 0) kept[n] = m;
    if (tokens_grad == nullptr) continue;
    W sum = 0, along = 0;
    for_row(from, r.width, r.packs, lane, [&](int i, W value) {
      const W scaled = upstream[i] * wide(r.weight[i]);
      sum += scaled;
      along += scaled * (value - m.mean) * m.rstd;
    });
    sum = warp_sum(sum) / static_cast<W>(r.width);
    along = warp_sum(along) / static_cast<W>(r.width);
    for_row(from, r.width, r.packs, lane, [&](int i, W value) {
      const W normed = (value - m.mean) * m.rstd;
      tokens_grad[row * r.width + i] =
          narrow<S>(m.rstd * (upstream[i] * wide(r.weight[i]) - sum - normed * along));
    });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < r.width; i += kRowThreads) {
    W of_weight = 0, of_bias = 0;
    for (int n = 0; n < rows; ++n) {
      const int64_t row = first + n;
      const W upstream = grad[row * r.width + i];
      const W value = wide(r.row(row / r.count, row % r.count)[i]);
      of_weight += upstream * (value - kept[n].mean) * kept[n].rstd;
      of_bias += upstream;
    }
    W* part = parts + int64_t(blockIdx.x) * 2 * r.width + i;
    part[0] = of_weight;
    part[r.width] = of_bias;
  }
}

// summed [B, count, columns] = for each token the sum of the rows of from that match it. A block takes
// a token and kColumnThreads columns.
template <typename S, typename O>
__global__ void __launch_bounds__(kColumnThreads)
    sum_by_token(const S* from, int64_t by_image, const int64_t* match, int count, int keys,
                 int columns, O* summed) {
  const int64_t image = blockIdx.x / count;
  const int column = blockIdx.y * kColumnThreads + threadIdx.x;
  const Wide<S> sum = sum_of_matches(from + image * by_image, match + image * keys, keys,
                                     static_cast<int>(blockIdx.x % count), columns, column);
  if (column < columns) summed[int64_t(blockIdx.x) * columns + column] = narrow<O>(sum);
}

// columns [keys, width] = the sum over images of from [B, count, width] at match
template <typename S>
__global__ void __launch_bounds__(kColumnThreads)
    sum_over_images(const S* from, const int64_t* match, int batch, int count, int keys, int width,
                    Wide<S>* columns) {
  const int key = blockIdx.x, i = blockIdx.y * kColumnThreads + threadIdx.x;
  if (i >= width) return;
  Wide<S> sum = 0;
  for (int image = 0; image < batch; ++image) {
    const int64_t token = int64_t(image) * count + match[int64_t(image) * keys + key];
    sum += wide(from[token * width + i]);
  }
  columns[int64_t(key) * width + i] = sum;
}

// tokens [n, 2, half] and their weights
template <typename S>
struct Halves {
  const S *tokens, *spatial, *spectral, *scale;
  int64_t count;  // of the halves
  int width;      // of a half
  bool packs;

  __device__ Wide<S> weight(int64_t half) const {
    return wide(half % 2 == 0 ? spatial[half / 2] : spectral[half / 2]);
  }
};

template <typename S>
__global__ void __launch_bounds__(kRowThreads) weigh(Halves<S> h, S* out) {
  using W = Wide<S>;
  const int lane = threadIdx.x % 32;
  const int64_t half = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (half >= h.count) return;
  const W factor = wide(*h.scale) * h.weight(half);
  S* to = out + half * h.width;
  for_row(h.tokens + half * h.width, h.width, h.packs, lane,
          [&](int i, W value) { to[i] = narrow<S>(value + factor * value); });
}

// Gradients of tokens (null: not wanted) and of the weights, and the shares of `scale`, parts [count].
template <typename S>
__global__ void __launch_bounds__(kRowThreads)
    weigh_backward(Halves<S> h, const S* grad, S* tokens_grad, S* spatial_grad, S* spectral_grad,
                   Wide<S>* parts) {
  using W = Wide<S>;
  const int lane = threadIdx.x % 32;
  const int64_t half = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  if (half >= h.count) return;
  const W scale = wide(*h.scale), weight = h.weight(half), factor = scale * weight;
  const S* row = h.tokens + half * h.width;
  W dot = 0;
  for_row(grad + half * h.width, h.width, h.packs, lane, [&](int i, W upstream) {
    dot += upstream * wide(row[i]);
    if (tokens_grad != nullptr)
      tokens_grad[half * h.width + i] = narrow<S>(upstream + factor * upstream);
  });
  dot = warp_sum(dot);
  if (lane > 0) return;
  (half % 2 == 0 ? spatial_grad : spectral_grad)[half / 2] = narrow<S>(scale * dot);
  parts[half] = dot * weight;
}

}  // namespace spectralx::cuda
