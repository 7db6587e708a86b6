// Random masking and moves of tokens. A token's rank is how many noises are smaller, counted: nothing
// is sorted. Gradients gather too: a row looks for the rows that went to it, in order.
#pragma once
#include "cuda/common/matches.cuh"

namespace spectralx::cuda {

constexpr int kMoveWarps = 4;  // of a block: a warp takes a token
constexpr int kMoveThreads = 32 * kMoveWarps;

// kept [B, keep], masked [B, L] and restore [B, L] from noise [B, L].
template <typename S>
__global__ void __launch_bounds__(kMoveThreads)
    rank_tokens(const S* noise, int64_t all, int tokens, int keep, int64_t* kept, bool* masked,
                int64_t* restore) {
  using W = Wide<S>;
  const int lane = threadIdx.x % 32;
  const int64_t at = int64_t(blockIdx.x) * kMoveWarps + threadIdx.x / 32;
  if (at >= all) return;  // the whole warp
  const int64_t image = at / tokens;
  const int i = static_cast<int>(at % tokens);
  const S* row = noise + image * tokens;
  const W own = wide(row[i]);
  const bool own_nan = own != own;
  int below = 0;
#pragma unroll 4
  for (int j = lane; j < tokens; j += 32) {
    const W other = wide(row[j]);
    const bool nan = other != other;
    // NaN last; equal noises, and NaN, in order.
    const bool same = other == own || (nan && own_nan);
    below += other < own || (own_nan && !nan) || (same && j < i);
  }
  below = warp_sum(below);
  if (lane > 0) return;
  restore[at] = below;
  masked[at] = below >= keep;
  if (below < keep) kept[image * keep + below] = i;
}

// out [B, count, width]: row ids[b, i] of tokens [B, kept, width] or, where there is none, `filler`
// [width], or zeros without it. U: a part of a row that is moved at once.
template <typename U>
__global__ void __launch_bounds__(kMoveThreads)
    move_tokens(const U* tokens, const int64_t* ids, const U* filler, int64_t all, int kept,
                int count, int width, U* out) {
  const int64_t at = int64_t(blockIdx.x) * kMoveWarps + threadIdx.x / 32;
  if (at >= all) return;
  const int64_t source = ids[at];
  const bool there = source >= 0 && source < kept;
  const U* from = there ? tokens + (at / count * kept + source) * width : filler;
  U* to = out + at * width;
  for (int i = threadIdx.x % 32; i < width; i += 32) to[i] = from != nullptr ? from[i] : U{};
}

// tokens [B, kept, columns]: the sums of the rows of grad [B, count, columns] whose ids are the token;
// rest, wide [B, columns]: of those whose ids are `kept` or more. A block takes a token, or the rest of
// an image, and kColumnThreads columns.
template <typename S>
__global__ void __launch_bounds__(kColumnThreads)
    collect_tokens(const S* grad, const int64_t* ids, int kept, int count, int columns, S* tokens,
                   Wide<S>* rest) {
  using W = Wide<S>;
  const int rows = kept + (rest != nullptr ? 1 : 0);
  const int64_t image = blockIdx.x / rows;
  const int row = static_cast<int>(blockIdx.x % rows);
  const int column = blockIdx.y * kColumnThreads + threadIdx.x;
  grad += image * count * columns, ids += image * count;
  if (row < kept) {
    const W sum = sum_of_matches(grad, ids, count, row, columns, column);
    if (column < columns) tokens[(image * kept + row) * columns + column] = narrow<S>(sum);
    return;
  }
  if (column >= columns) return;
  W sum = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i)  // most rows are: loads do not wait for each other
    sum += ids[i] >= kept ? wide(grad[int64_t(i) * columns + column]) : W(0);
  rest[image * columns + column] = sum;
}

}  // namespace spectralx::cuda
