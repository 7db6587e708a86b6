// Attention within windows, and of queries shared by all images: 16 or 32 queries a block, 64 keys at
// a time. Positions of a window are addresses; those outside the map are one key that counts as often
// as there are, with which the sums over keys begin. No score leaves shared memory.
#pragma once
#include "cuda/common/tile.cuh"

namespace spectralx::cuda {

struct AttentionSizes {
  int heads, dim, queries, rows, columns, height, width;
  int tile;   // rows of a block: 16 or 32
  int block;  // columns of a head that a block makes, a multiple of 8
  int64_t q_image, q_row, k_image, k_row, all_rows;  // all_rows: of the output

  __host__ __device__ int across() const { return (width + columns - 1) / columns; }
  __host__ __device__ int windows() const { return (height + rows - 1) / rows * across(); }
  __host__ __device__ int keys() const { return rows * columns; }
  __host__ __device__ int count() const { return queries > 0 ? queries : keys(); }
  __host__ __device__ int chunks() const { return (dim + block - 1) / block; }
};

template <typename S>
struct AttentionTensors {
  const S *q, *k, *v, *padding_k, *padding_v, *dout;
  S *out, *dk, *dv;
  void* dq;
  Wide<S>*log_sum, *slope, *parts, scale;
  int64_t dq_row;
  bool dq_wide;
};

constexpr int kScoreStride = kChunk + 8;

// Where the parts of a block lie in shared memory; bytes are multiples of 16.
template <typename S>
struct AttentionLayout {
  int left, right, turned, operand, scores, rows;

  __host__ __device__ AttentionLayout(int tile, int block)
      : left(tile * operand_stride<S>(kChunk) * int(sizeof(S))),
        right(kChunk * operand_stride<S>(kChunk) * int(sizeof(S))),
        turned(block * operand_stride<S>(kChunk) * int(sizeof(S))), operand(left),
        scores(tile * kScoreStride * int(sizeof(Wide<S>))),
        rows(4 * kChunk * int(sizeof(Wide<S>)) + 2 * kChunk * int(sizeof(int64_t))) {}
  __host__ __device__ int bytes() const { return left + right + turned + 2 * operand + 2 * scores + rows; }
};

template <typename S>
struct AttentionBlock {
  using W = Wide<S>;
  static constexpr int kStride = operand_stride<S>(kChunk);
  AttentionSizes s;
  int head, window, tile, column;  // tile: which; column: the first of this block
  int64_t image;
  S *left, *right, *turned, *first, *second;  // operands
  W *scores, *grads, *largest, *total, *along, *shrink;
  int64_t *row_at, *column_at;  // positions, or -1

  __device__ explicit AttentionBlock(const AttentionSizes& sizes) : s(sizes) {
    const int64_t block = blockIdx.x;
    head = static_cast<int>(block % s.heads);
    window = static_cast<int>(block / s.heads % s.windows());
    image = block / s.heads / s.windows();
    tile = blockIdx.y / s.chunks();
    column = blockIdx.y % s.chunks() * s.block;
    const AttentionLayout<S> layout(s.tile, s.block);
    unsigned char* memory = dynamic_shared();
    const auto part = [&](int size) {
      unsigned char* at = memory;
      memory += size;
      return at;
    };
    left = reinterpret_cast<S*>(part(layout.left));
    right = reinterpret_cast<S*>(part(layout.right));
    turned = reinterpret_cast<S*>(part(layout.turned));
    first = reinterpret_cast<S*>(part(layout.operand));
    second = reinterpret_cast<S*>(part(layout.operand));
    scores = reinterpret_cast<W*>(part(layout.scores));
    grads = reinterpret_cast<W*>(part(layout.scores));
    row_at = reinterpret_cast<int64_t*>(memory);
    column_at = row_at + kChunk;
    largest = reinterpret_cast<W*>(column_at + kChunk);
    total = largest + kChunk;
    along = total + kChunk;
    shrink = along + kChunk;
  }

  // Position in the map of place t of the window, or -1.
  __device__ int64_t key(int t) const {
    const int y = window / s.across() * s.rows + t / s.columns;
    const int x = window % s.across() * s.columns + t % s.columns;
    return t < s.keys() && y < s.height && x < s.width ? int64_t(y) * s.width + x : -1;
  }
  __device__ int64_t query(int t) const {
    return s.queries > 0 ? (t < s.queries ? t : -1) : key(t);
  }
  // Row of the output of a query's position.
  __device__ int64_t output(int64_t position) const {
    return image * (s.queries > 0 ? s.queries : int64_t(s.height) * s.width) + position;
  }
  __device__ int copies() const {
    const int down = min(s.height - window / s.across() * s.rows, s.rows);
    const int right_side = min(s.width - window % s.across() * s.columns, s.columns);
    return s.keys() - down * right_side;
  }
  __device__ const S* queries_of(const S* q) const {
    return q + image * s.q_image + int64_t(head) * s.dim;
  }
  __device__ const S* keys_of(const S* k) const {
    return k + image * s.k_image + int64_t(head) * s.dim;
  }
  __device__ const S* outputs_of(const S* dout) const {
    return dout + output(0) * s.heads * s.dim + int64_t(head) * s.dim;
  }
  __device__ int64_t output_row() const { return int64_t(s.heads) * s.dim; }

  // Columns [c0, c0 + 64) of rows `at` of base to an operand of `all` rows; zeros for no row.
  __device__ void stage_rows(S* target, int all, const S* base, const int64_t* at, int64_t stride,
                             int c0) const {
    constexpr int kSize = Pack<S>::kSize, kPacks = kChunk / kSize;
    const int depth = s.dim - c0;
    for (int i = threadIdx.x; i < all * kPacks; i += kThreads) {
      const int n = i / kPacks, k = i % kPacks * kSize;
      const S* from = base + at[n] * stride + c0 + k;
      Pack<S> pack;
      if (at[n] >= 0 && k + kSize <= depth && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        pack = *reinterpret_cast<const Pack<S>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j)
          pack.values[j] = at[n] >= 0 && k + j < depth ? from[j] : narrow<S>(0);
      }
      *reinterpret_cast<Pack<S>*>(target + n * kStride + k) = pack;
    }
  }

  // This block's columns of the 64 rows `at`, transposed: turned[column][row].
  __device__ void turn(const S* base, const int64_t* at, int64_t stride) const {
    for (int i = threadIdx.x; i < s.block * kChunk; i += kThreads) {
      const int n = i % s.block, k = i / s.block;
      turned[n * kStride + k] = at[k] >= 0 && column + n < s.dim
                                    ? base[at[k] * stride + column + n]
                                    : narrow<S>(0);
    }
  }

  // Rows row_at of a times the 64 rows column_at of b. Barriers before the operands are replaced.
  __device__ Tiles<W> products(const S* a, int64_t a_stride, const S* b, int64_t b_stride,
                               const Share& share) const {
    Tiles<W> tiles;
    for (int c0 = 0; c0 < s.dim; c0 += kChunk) {
      __syncthreads();
      stage_rows(left, s.tile, a, row_at, a_stride, c0);
      stage_rows(right, kChunk, b, column_at, b_stride, c0);
      __syncthreads();
      add(tiles, left, right, share, min(kChunk, s.dim - c0));
    }
    return tiles;
  }

  // tiles += operand turned^T or left right^T.
  __device__ void add(Tiles<W>& tiles, const S* a, const S* b, const Share& share,
                      int depth) const {
    const S* low = a + (share.row * 16 + threadIdx.x % 32 / 4) * kStride;
    multiply<S>(tiles, low, low + 8 * kStride, b, kStride, share, depth);
  }

  __device__ void put(const Tiles<W>& tiles, const Share& share, W factor, W* to) const {
    for_tiles(tiles, share, [&](int row, int at, W value) {
      to[row * kScoreStride + at] = value * factor;
    });
  }

  // Positions of the rows of this tile, and of 64 columns from `from` on.
  template <typename At>
  __device__ void place_rows(At at) const {
    for (int i = threadIdx.x; i < s.tile; i += kThreads) row_at[i] = at(tile * s.tile + i);
  }
  template <typename At>
  __device__ void place_columns(int from, At at) const {
    for (int i = threadIdx.x; i < kChunk; i += kThreads) column_at[i] = at(from + i);
  }

  // Row `row` of base times a single vector, by a warp; every lane gets it.
  __device__ W with_one(const S* base, int row, int64_t stride, const S* one) const {
    W sum = 0;
    if (row_at[row] >= 0) {
      for (int c = threadIdx.x % 32; c < s.dim; c += 32)
        sum += wide(base[row_at[row] * stride + c]) * wide(one[c]);
    }
    return warp_sum(sum);
  }

  // How a row's sums go on with 64 more scores of which `score` and `along_of` are this lane's two;
  // a NaN comes in through the sums.
  __device__ void extend(int row, const W (&score)[2], const W (&grad)[2], W (&p)[2]) const {
    const W none = -INFINITY;
    W highest = score[0] > score[1] || score[1] != score[1] ? score[0] : score[1];
    highest = highest == highest ? highest : none;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const W other = __shfl_xor_sync(0xffffffffu, highest, distance);
      highest = other > highest ? other : highest;
    }
    const W before = largest[row];
    highest = highest > before ? highest : before;
    const W base = highest == none ? W(0) : highest;
    W sum = 0, weighted = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      p[i] = exponential(score[i] - base);
      sum += p[i];
      weighted += p[i] * grad[i];
    }
    const W less = exponential(before - base);
    sum = warp_sum(sum);
    weighted = warp_sum(weighted);
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      total[row] = total[row] * less + sum;
      along[row] = along[row] * less + weighted;
      shrink[row] = less;
      largest[row] = highest;
    }
  }
};

// Two blocks a multiprocessor: for three, ptxas would spill.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    attention_forward(AttentionSizes s, AttentionTensors<S> t) {
  using W = Wide<S>;
  const AttentionBlock<S> b(s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Share share(s.tile / 16, kChunk / 8), out_share(s.tile / 16, s.block / 8);
  const S *q = b.queries_of(t.q), *k = b.keys_of(t.k), *v = b.keys_of(t.v);
  b.place_rows([&](int i) { return b.query(i); });
  __syncthreads();
  const int copies = t.padding_k == nullptr ? 0 : b.copies();
  Tiles<W> out;
  for (int row = warp; row < s.tile; row += kWarps) {
    W score = -INFINITY;
    if (copies > 0) score = t.scale * b.with_one(q, row, s.q_row, t.padding_k + int64_t(b.head) * s.dim);
    if (lane == 0) b.largest[row] = score, b.total[row] = copies, b.along[row] = 0;
  }
  if (copies > 0) {
    const int first = 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = b.column + (out_share.first + i * out_share.step) * 8 + first + j % 2;
        if (i < out_share.count && at < s.dim)
          out.values[i][j] = W(copies) * wide(t.padding_v[int64_t(b.head) * s.dim + at]);
      }
    }
  }
  for (int n0 = 0; n0 < s.keys(); n0 += kChunk) {
    b.place_columns(n0, [&](int i) { return b.key(i); });
    const Tiles<W> tiles = b.products(q, s.q_row, k, s.k_row, share);
    b.put(tiles, share, t.scale, b.scores);
    __syncthreads();
    for (int row = warp; row < s.tile; row += kWarps) {
      W score[2], none[2] = {0, 0}, p[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = lane + 32 * i;
        score[i] = b.column_at[at] >= 0 ? b.scores[row * kScoreStride + at] : W(-INFINITY);
      }
      b.extend(row, score, none, p);
#pragma unroll
      for (int i = 0; i < 2; ++i) b.first[row * b.kStride + lane + 32 * i] = narrow<S>(p[i]);
    }
    b.turn(v, b.column_at, s.k_row);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (i < out_share.count) out.values[i][j] *= b.shrink[out_share.row * 16 + lane / 4 + j / 2 * 8];
    }
    b.add(out, b.first, b.turned, out_share, kChunk);
  }
  for_tiles(out, out_share, [&](int row, int at, W value) {
    if (b.row_at[row] < 0 || b.column + at >= s.dim) return;
    t.out[b.output(b.row_at[row]) * b.output_row() + int64_t(b.head) * s.dim + b.column + at] =
        narrow<S>(value / b.total[row]);
  });
}

}  // namespace spectralx::cuda
