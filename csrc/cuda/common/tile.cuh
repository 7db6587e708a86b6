// Products of small tiles by one warp, in one register layout for every type: that of
// mma.m16n8k16. With g = lane / 4 and q = lane % 4 a lane holds of a 16 x 8 tile the columns 2 q and
// 2 q + 1 of rows g (registers 0, 1) and g + 8 (registers 2, 3). bfloat16 and half run on tensor
// cores; float and double on the ordinary units, in full precision.
//
// Operands lie in shared memory with K contiguous, filled up with zeros to a multiple of 16, and
// rows padded by 16 bytes, which keeps the eight rows of a tile in different banks.
#pragma once
#include "cuda/common/scalar.cuh"

namespace spectralx::cuda {

constexpr int kChunk = 64;  // columns, and depth, of what is staged at once
constexpr int kWarps = 8;   // of the blocks that compute tiles
constexpr int kThreads = 32 * kWarps;

// Row stride in elements of an operand of depth `depth`.
template <typename S>
__host__ __device__ constexpr int operand_stride(int depth) {
  return static_cast<int>(round_up(depth, 16)) + 16 / static_cast<int>(sizeof(S));
}

#ifndef SPECTRALX_CUDA_ON_CPU
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4],
                                                            const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const unsigned (&a)[4],
                                                     const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Which 16 x 8 tiles a warp computes of `row_tiles` (1 to 4) x `column_tiles` (1 to 8): row tile
// `row`, column tiles `first`, `first` + `step`, ... `count` of them, 4 at most. Idle: count 0.
struct Share {
  int row, first, step, count;

  __device__ Share(int row_tiles, int column_tiles) {
    const int warp = threadIdx.x / 32;
    step = row_tiles == 1 ? kWarps : row_tiles == 2 ? kWarps / 2 : kWarps / 4;
    row = warp / step;
    first = warp % step;
    const bool idle = row >= row_tiles || first >= column_tiles;
    count = idle ? 0 : (column_tiles - first + step - 1) / step;
  }
};

template <typename W>
struct Tiles {
  W values[4][4] = {};
};

// tiles[i] += A B[tile i]^T. `low`, `high`: the lane's rows g and g + 8 of A; `b`: row 0 of B, whose
// tile i are the 8 rows from 8 (share.first + i share.step) on.
template <typename S>
__device__ __forceinline__ void multiply(Tiles<Wide<S>>& tiles, const S* low, const S* high,
                                         const S* b, int stride, const Share& share, int depth) {
  if (share.count == 0) return;
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  if constexpr (sizeof(S) == 2) {
    const auto word = [](const S* at) { return *reinterpret_cast<const unsigned*>(at); };
    for (int k0 = 0; k0 < depth; k0 += 16) {
      const int k = k0 + 2 * q;
      const unsigned left[4] = {word(low + k), word(high + k), word(low + k + 8),
                                word(high + k + 8)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= share.count) break;
        const S* row = b + ((share.first + i * share.step) * 8 + g) * stride + k;
        const unsigned right[2] = {word(row), word(row + 8)};
        mma_m16n8k16<S>(tiles.values[i], left, right);
      }
    }
  } else {
    constexpr int kSize = Pack<S>::kSize;
    for (int k = 0; k < round_up(depth, 16); k += kSize) {
      const Pack<S> above = *reinterpret_cast<const Pack<S>*>(low + k);
      const Pack<S> below = *reinterpret_cast<const Pack<S>*>(high + k);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= share.count) break;
        const S* row = b + ((share.first + i * share.step) * 8 + 2 * q) * stride + k;
        const Pack<S> left = *reinterpret_cast<const Pack<S>*>(row);
        const Pack<S> right = *reinterpret_cast<const Pack<S>*>(row + stride);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          tiles.values[i][0] += above.values[j] * left.values[j];
          tiles.values[i][1] += above.values[j] * right.values[j];
          tiles.values[i][2] += below.values[j] * left.values[j];
          tiles.values[i][3] += below.values[j] * right.values[j];
        }
      }
    }
  }
}

// Calls use(row, column, value) for the lane's values: row in the 16 x (8 column_tiles) product's
// rows counted from the share's first, column from 0.
template <typename W, typename Use>
__device__ __forceinline__ void for_tiles(const Tiles<W>& tiles, const Share& share, Use use) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i >= share.count) break;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      use(share.row * 16 + g + j / 2 * 8, (share.first + i * share.step) * 8 + 2 * q + j % 2,
          tiles.values[i][j]);
  }
}

// target[n * stride + k] = source[n * source_stride + k] for n < rows, k < depth; zeros up to
// `all_rows` and up to the next multiple of 16 of depth. By the whole block.
template <typename S>
__device__ __forceinline__ void stage(S* target, int stride, int all_rows, const S* source,
                                      int64_t source_stride, int rows, int depth) {
  constexpr int kSize = Pack<S>::kSize;
  const int packs = static_cast<int>(round_up(depth, 16)) / kSize;
  const bool aligned =
      reinterpret_cast<uintptr_t>(source) % 16 == 0 && source_stride % kSize == 0;
  for (int i = threadIdx.x; i < all_rows * packs; i += kThreads) {
    const int n = i / packs, k = i % packs * kSize;
    Pack<S> pack;
    const S* at = source + n * source_stride + k;
    if (n < rows && aligned && k + kSize <= depth) {
      pack = *reinterpret_cast<const Pack<S>*>(at);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        pack.values[j] = n < rows && k + j < depth ? at[j] : narrow<S>(0);
    }
    *reinterpret_cast<Pack<S>*>(target + n * stride + k) = pack;
  }
}

// The transpose: target[n * stride + k] = source[k * source_stride + n]. Neighbouring threads read
// neighbouring n.
template <typename S>
__device__ __forceinline__ void stage_transposed(S* target, int stride, int all_rows,
                                                 const S* source, int64_t source_stride, int rows,
                                                 int depth) {
  const int all_depth = static_cast<int>(round_up(depth, 16));
  for (int i = threadIdx.x; i < all_rows * all_depth; i += kThreads) {
    const int n = i % all_rows, k = i / all_rows;
    target[n * stride + k] =
        n < rows && k < depth ? source[k * source_stride + n] : narrow<S>(0);
  }
}

}  // namespace spectralx::cuda
