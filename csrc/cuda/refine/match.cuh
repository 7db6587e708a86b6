// The match: sums over keys, then the comparison over queries, on tiles of scores in shared memory.
//
// A warp takes rows of a tile of scores [rows, 64]; its lanes take columns. In the first pass rows are
// queries, in the second keys.
#pragma once
#include "cuda/common/tile.cuh"

namespace spectralx::cuda {

struct MatchSizes {
  int rows, count, width;  // queries, keys
  int splits, span;        // of the keys in the first pass; span a multiple of kChunk
  int tile;                // rows of a block: 16 or 32
};

constexpr int kScoreStride = kChunk + 1;

// Bytes of shared memory: two operands, the scores, a value a column.
template <typename S>
__host__ __device__ constexpr size_t match_shared(int tile) {
  return (tile + kChunk) * operand_stride<S>(kChunk) * sizeof(S) +
         (tile * kScoreStride + kChunk) * sizeof(Wide<S>);
}

template <typename W>
__device__ __forceinline__ bool infinite(W x) {
  return isinf(x);
}
template <typename W>
__device__ __forceinline__ W lowest() {
  return -W(INFINITY);
}
// What is taken off before an exponential: 0 for an infinity.
template <typename W>
__device__ __forceinline__ W base_of(W largest) {
  return infinite(largest) ? W(0) : largest;
}
// A sum of exponentials under `largest`, under `base` instead.
template <typename W>
__device__ __forceinline__ W moved(W total, W largest, W base) {
  return total * (largest == lowest<W>() ? W(0) : exponential(base_of(largest) - base));
}

template <typename S>
struct MatchTile {
  using W = Wide<S>;
  static constexpr int kStride = operand_stride<S>(kChunk);
  S *left, *right;
  W *scores, *values;

  __device__ explicit MatchTile(int tile) {
    unsigned char* memory = dynamic_shared();
    left = reinterpret_cast<S*>(memory);
    right = left + tile * kStride;
    scores = reinterpret_cast<W*>(right + kChunk * kStride);
    values = scores + tile * kScoreStride;
  }

  // scores = scale times the rows a [tile] times the rows b [kChunk], of which `a_rows` and `b_rows`
  // exist. With a barrier on either side.
  __device__ void score(const S* a, int a_rows, const S* b, int b_rows, int width, int tile,
                        W scale) const {
    const Share share(tile / 16, kChunk / 8);
    const S* low = left + (share.row * 16 + threadIdx.x % 32 / 4) * kStride;
    Tiles<W> tiles;
    for (int k0 = 0; k0 < width; k0 += kChunk) {
      const int depth = min(kChunk, width - k0);
      __syncthreads();
      stage(left, kStride, tile, a + k0, width, a_rows, depth);
      stage(right, kStride, kChunk, b + k0, width, b_rows, depth);
      __syncthreads();
      multiply<S>(tiles, low, low + 8 * kStride, right, kStride, share, depth);
    }
    __syncthreads();
    for_tiles(tiles, share, [&](int row, int column, W value) {
      scores[row * kScoreStride + column] = value * scale;
    });
    __syncthreads();
  }
};

// Of `tile` queries and `span` keys the largest score and the sum of exponentials under it, both
// [B, splits, rows]; a NaN is in the sum.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    match_sums(MatchSizes s, const S* queries, const S* keys, Wide<S> scale, Wide<S>* peaks,
               Wide<S>* totals) {
  using W = Wide<S>;
  const int tiles = static_cast<int>(ceil_div(s.rows, s.tile));
  const int64_t image = blockIdx.x / tiles;
  const int first = blockIdx.x % tiles * s.tile, split = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int last = min(s.count, (split + 1) * s.span);
  queries += (image * s.rows + first) * s.width;
  keys += image * s.count * s.width;
  const MatchTile<S> tile(s.tile);
  constexpr int kMine = 32 / kWarps;  // rows of a warp
  W peak[kMine], total[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) peak[i] = lowest<W>(), total[i] = 0;
  for (int key = split * s.span; key < last; key += kChunk) {
    const int columns = min(kChunk, last - key);
    tile.score(queries, min(s.tile, s.rows - first), keys + int64_t(key) * s.width, columns,
               s.width, s.tile, scale);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int row = warp + i * kWarps;
      if (row >= s.tile) break;
      const W* scores = tile.scores + row * kScoreStride;
      W larger = peak[i];
      for (int j = lane; j < columns; j += 32) larger = scores[j] > larger ? scores[j] : larger;
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        const W other = __shfl_xor_sync(0xffffffffu, larger, distance);
        larger = other > larger ? other : larger;
      }
      const W base = base_of(larger);
      W added = 0;
      for (int j = lane; j < columns; j += 32) added += exponential(scores[j] - base);
      total[i] = moved(total[i], peak[i], base) + warp_sum(added);
      peak[i] = larger;
    }
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int row = warp + i * kWarps;
    if (lane > 0 || row >= s.tile || first + row >= s.rows) continue;
    const int64_t at = (image * s.splits + split) * s.rows + first + row;
    peaks[at] = peak[i];
    totals[at] = total[i];
  }
}

// Whether (value, query) comes before the best so far: larger, or the lower of equal ones; a NaN
// counts as the largest.
template <typename W>
__device__ __forceinline__ bool comes_before(W value, int query, W best, int best_query) {
  const bool nan = isnan(value), best_nan = isnan(best);
  if (nan || best_nan) return nan && (!best_nan || query < best_query);
  return value > best || (value == best && query < best_query);
}

// Of `tile` keys the query with the largest score less the logarithm of its sum: [B, count].
template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    match_choose(MatchSizes s, const S* queries, const S* keys, Wide<S> scale,
                 const Wide<S>* peaks, const Wide<S>* totals, int64_t* match) {
  using W = Wide<S>;
  const int tiles = static_cast<int>(ceil_div(s.count, s.tile));
  const int64_t image = blockIdx.x / tiles;
  const int first = blockIdx.x % tiles * s.tile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  queries += image * s.rows * s.width;
  keys += (image * s.count + first) * s.width;
  peaks += image * s.splits * s.rows;
  totals += image * s.splits * s.rows;
  const MatchTile<S> tile(s.tile);
  constexpr int kMine = 32 / kWarps;
  W best[kMine];
  int query[kMine];
#pragma unroll
  for (int i = 0; i < kMine; ++i) best[i] = lowest<W>(), query[i] = lane;
  for (int q0 = 0; q0 < s.rows; q0 += kChunk) {
    const int columns = min(kChunk, s.rows - q0);
    if (static_cast<int>(threadIdx.x) < columns) {
      const int q = q0 + threadIdx.x;
      W peak = lowest<W>(), total = 0;
      for (int split = 0; split < s.splits; ++split) {
        const W part = peaks[int64_t(split) * s.rows + q];
        peak = part > peak ? part : peak;
      }
      for (int split = 0; split < s.splits; ++split) {
        const int64_t at = int64_t(split) * s.rows + q;
        total += moved(totals[at], peaks[at], base_of(peak));
      }
      tile.values[threadIdx.x] =
          isnan(total) ? total : infinite(peak) ? peak : peak + logarithm(total);
    }
    tile.score(keys, min(s.tile, s.count - first), queries + int64_t(q0) * s.width, columns,
               s.width, s.tile, scale);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int row = warp + i * kWarps;
      if (row >= s.tile) break;
      for (int j = lane; j < columns; j += 32) {
        const W value = tile.scores[row * kScoreStride + j] - tile.values[j];
        if (comes_before(value, q0 + j, best[i], query[i])) best[i] = value, query[i] = q0 + j;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int row = warp + i * kWarps;
    if (row >= s.tile) break;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const W value = __shfl_xor_sync(0xffffffffu, best[i], distance);
      const int other = __shfl_xor_sync(0xffffffffu, query[i], distance);
      if (comes_before(value, other, best[i], query[i])) best[i] = value, query[i] = other;
    }
    if (lane == 0 && first + row < s.count) match[image * s.count + first + row] = query[i];
  }
}

}  // namespace spectralx::cuda
