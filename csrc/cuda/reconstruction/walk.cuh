// A cell of a prediction, and the order in which a block goes through it.
#pragma once
#include "cuda/common/scalar.cuh"

namespace spectralx::cuda {

constexpr int kErrorThreads = 256;
constexpr int kErrorWarps = kErrorThreads / 32;

struct Cell {
  int64_t image;
  int row, column;               // in the grid of cells
  int top, left, rows, columns;  // in pixels
};

// The elements threadIdx.x, threadIdx.x + kErrorThreads, ... of a box, as places along its three
// sides, of which `fast` runs first; divided once, then carried.
struct Walk {
  int fasts, middles;
  int step_fast, step_middle, step_slow;
  int fast, middle, slow;

  __device__ Walk(int fasts_, int middles_)
      : fasts(fasts_),
        middles(middles_),
        step_fast(kErrorThreads % fasts_),
        step_middle(kErrorThreads / fasts_ % middles_),
        step_slow(kErrorThreads / fasts_ / middles_),
        fast(static_cast<int>(threadIdx.x) % fasts_),
        middle(static_cast<int>(threadIdx.x) / fasts_ % middles_),
        slow(static_cast<int>(threadIdx.x) / fasts_ / middles_) {}

  __device__ __forceinline__ void next() {
    fast += step_fast;
    const int first = fast >= fasts;
    fast -= first ? fasts : 0;
    middle += step_middle + first;
    const int second = middle >= middles;
    middle -= second ? middles : 0;
    slow += step_slow + second;
  }
};

}  // namespace spectralx::cuda
