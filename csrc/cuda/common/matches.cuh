// Sums of rows that an index sends to the same place.
#pragma once
#include "cuda/common/scalar.cuh"

namespace spectralx::cuda {

constexpr int kColumnThreads = 128;  // of blocks whose threads take a column each

// The sum of column `column` over the rows of from [count, columns] whose index is `place`, in order;
// 0 for a column outside. By whole warps, which look at 32 rows at once.
template <typename S>
__device__ __forceinline__ Wide<S> sum_of_matches(const S* from, const int64_t* index, int count,
                                                  int place, int columns, int column) {
  const int lane = threadIdx.x % 32;
  Wide<S> sum = 0;
  for (int first = 0; first < count; first += 32) {
    unsigned votes = __ballot_sync(
        0xffffffffu, first + lane < count && index[min(first + lane, count - 1)] == place);
    for (; votes != 0; votes &= votes - 1) {  // the lowest first
      const int row = first + __popc((votes & (0u - votes)) - 1);
      if (column < columns) sum += wide(from[int64_t(row) * columns + column]);
    }
  }
  return sum;
}

}  // namespace spectralx::cuda
