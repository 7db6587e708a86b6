// Backward of attention.cuh: scores are made again, the gradient of the queries first.
#pragma once
#include "cuda/hypert/attention.cuh"

namespace spectralx::cuda {

// The gradient of q, and of every row the log of its sum of exponentials and the mean gradient of its
// probabilities, which `attention_keys_backward` needs.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    attention_queries_backward(AttentionSizes s, AttentionTensors<S> t) {
  using W = Wide<S>;
  const AttentionBlock<S> b(s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Share share(s.tile / 16, kChunk / 8), out_share(s.tile / 16, s.block / 8);
  const S *q = b.queries_of(t.q), *k = b.keys_of(t.k), *v = b.keys_of(t.v);
  const S* dout = b.outputs_of(t.dout);
  const int64_t of_head = int64_t(b.head) * s.dim;
  b.place_rows([&](int i) { return b.query(i); });
  __syncthreads();
  const int copies = t.padding_k == nullptr ? 0 : b.copies();
  for (int row = warp; row < s.tile; row += kWarps) {
    W score = -INFINITY, grad = 0;
    if (copies > 0) {
      score = t.scale * b.with_one(q, row, s.q_row, t.padding_k + of_head);
      grad = b.with_one(dout, row, b.output_row(), t.padding_v + of_head);
    }
    if (lane == 0) b.largest[row] = score, b.total[row] = copies, b.along[row] = grad * W(copies);
  }
  for (int n0 = 0; n0 < s.keys(); n0 += kChunk) {
    __syncthreads();
    b.place_columns(n0, [&](int i) { return b.key(i); });
    b.put(b.products(q, s.q_row, k, s.k_row, share), share, t.scale, b.scores);
    b.put(b.products(dout, b.output_row(), v, s.k_row, share), share, W(1), b.grads);
    __syncthreads();
    for (int row = warp; row < s.tile; row += kWarps) {
      W score[2], grad[2], p[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = lane + 32 * i;
        score[i] = b.column_at[at] >= 0 ? b.scores[row * kScoreStride + at] : W(-INFINITY);
        grad[i] = b.grads[row * kScoreStride + at];
      }
      b.extend(row, score, grad, p);
    }
  }
  __syncthreads();
  for (int row = threadIdx.x; row < s.tile; row += kThreads) {
    b.along[row] /= b.total[row];
    b.largest[row] += logarithm(b.total[row]);
    if (b.row_at[row] < 0 || b.column > 0) continue;
    const int64_t at = int64_t(b.head) * s.all_rows + b.output(b.row_at[row]);
    t.log_sum[at] = b.largest[row];
    t.slope[at] = b.along[row];
  }
  Tiles<W> dq;
  for (int n0 = 0; n0 < s.keys(); n0 += kChunk) {
    __syncthreads();
    b.place_columns(n0, [&](int i) { return b.key(i); });
    const Tiles<W> scores = b.products(q, s.q_row, k, s.k_row, share);
    const Tiles<W> grads = b.products(dout, b.output_row(), v, s.k_row, share);
    b.put(grads, share, W(1), b.grads);
    for_tiles(scores, share, [&](int row, int at, W value) {
      const bool there = b.row_at[row] >= 0 && b.column_at[at] >= 0;
      const W p = exponential(value * t.scale - b.largest[row]);
      const W grad = b.grads[row * kScoreStride + at];  // put by this very lane
      b.first[row * b.kStride + at] =
          narrow<S>(there ? p * (grad - b.along[row]) * t.scale : W(0));
    });
    b.turn(k, b.column_at, s.k_row);
    __syncthreads();
    b.add(dq, b.first, b.turned, out_share, kChunk);
  }
  if (t.parts != nullptr) {
    // Of the padded position: its probability and its score's gradient, row by row.
    __syncthreads();
    for (int row = warp; row < s.tile; row += kWarps) {
      W p = 0, dscore = 0;
      if (copies > 0 && b.row_at[row] >= 0) {
        const W score = t.scale * b.with_one(q, row, s.q_row, t.padding_k + of_head);
        const W grad = b.with_one(dout, row, b.output_row(), t.padding_v + of_head);
        p = W(copies) * exponential(score - b.largest[row]);
        dscore = p * (grad - b.along[row]) * t.scale;
      }
      if (lane == 0) b.total[row] = p, b.shrink[row] = dscore;
    }
    __syncthreads();
    const int64_t tiles = gridDim.y / s.chunks();
    const int64_t part = (b.image * s.windows() + b.window) * tiles + b.tile;
    W* to = t.parts + part * 2 * b.output_row() + of_head;
    for (int c = threadIdx.x; c < s.block && b.column + c < s.dim; c += kThreads) {
      W key = 0, value = 0;
      for (int row = 0; row < s.tile; ++row) {
        if (b.row_at[row] < 0) continue;
        key += b.shrink[row] * wide(q[b.row_at[row] * s.q_row + b.column + c]);
        value += b.total[row] * wide(dout[b.row_at[row] * b.output_row() + b.column + c]);
      }
      to[b.column + c] = key;
      to[b.output_row() + b.column + c] = value;
    }
  }
  for_tiles(dq, out_share, [&](int row, int at, W value) {
    if (b.row_at[row] < 0 || b.column + at >= s.dim) return;
    if (t.parts != nullptr && copies > 0)
      value += b.shrink[row] * wide(t.padding_k[of_head + b.column + at]);
    const int64_t to = b.output(b.row_at[row]) * t.dq_row + of_head + b.column + at;
    if (t.dq_wide) {
      static_cast<W*>(t.dq)[to] = value;
    } else {
      static_cast<S*>(t.dq)[to] = narrow<S>(value);
    }
  });
}

// The gradients of k and v, or their sum: a block takes 16 or 32 keys, 64 queries at a time.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    attention_keys_backward(AttentionSizes s, AttentionTensors<S> t) {
  using W = Wide<S>;
  const AttentionBlock<S> b(s);
  const Share share(s.tile / 16, kChunk / 8), out_share(s.tile / 16, s.block / 8);
  const S *q = b.queries_of(t.q), *k = b.keys_of(t.k), *v = b.keys_of(t.v);
  const S* dout = b.outputs_of(t.dout);
  b.place_rows([&](int i) { return b.key(i); });
  Tiles<W> dk, dv;
  for (int t0 = 0; t0 < s.count(); t0 += kChunk) {
    __syncthreads();
    b.place_columns(t0, [&](int i) { return b.query(i); });
    for (int i = threadIdx.x; i < kChunk; i += kThreads) {
      const int64_t position = b.query(t0 + i);
      const int64_t at = int64_t(b.head) * s.all_rows + b.output(position);
      b.largest[i] = position >= 0 ? t.log_sum[at] : W(0);
      b.along[i] = position >= 0 ? t.slope[at] : W(0);
    }
    const Tiles<W> scores = b.products(k, s.k_row, q, s.q_row, share);
    const Tiles<W> grads = b.products(v, s.k_row, dout, b.output_row(), share);
    b.put(grads, share, W(1), b.grads);
    for_tiles(scores, share, [&](int row, int at, W value) {
      const bool there = b.row_at[row] >= 0 && b.column_at[at] >= 0;
      const W p = there ? exponential(value * t.scale - b.largest[at]) : W(0);
      const W grad = b.grads[row * kScoreStride + at];  // put by this very lane
      b.first[row * b.kStride + at] = narrow<S>(p);
      b.second[row * b.kStride + at] = narrow<S>(there ? p * (grad - b.along[at]) * t.scale : W(0));
    });
    b.turn(dout, b.column_at, b.output_row());
    __syncthreads();
    b.add(dv, b.first, b.turned, out_share, kChunk);
    __syncthreads();
    b.turn(q, b.column_at, s.q_row);
    __syncthreads();
    b.add(dk, b.second, b.turned, out_share, kChunk);
  }
  __syncthreads();
  const int64_t base = b.image * s.k_image + int64_t(b.head) * s.dim + b.column;
  if (t.dv == nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) dk.values[i][j] += dv.values[i][j];
    }
  }
  const auto store = [&](const Tiles<W>& tiles, S* to) {
    for_tiles(tiles, out_share, [&](int row, int at, W value) {
      if (b.row_at[row] >= 0 && b.column + at < s.dim)
        to[base + b.row_at[row] * s.k_row + at] = narrow<S>(value);
    });
  };
  store(dk, t.dk);
  if (t.dv != nullptr) store(dv, t.dv);
}

}  // namespace spectralx::cuda
