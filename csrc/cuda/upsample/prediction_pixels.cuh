// What a thread of prediction.cuh knows of its pixels, and the two rounds over the classes: the largest
// logit with its class, then the sum of exponentials.
#pragma once
#include "cuda/common/scalar.cuh"
#include "cuda/upsample/axis.cuh"

namespace spectralx::cuda {

constexpr int kColumns = 128;  // threads of a block, output columns at a time
constexpr int kRows = 4;       // output rows at a time

template <typename W>
struct PredictionSizes {
  AxisOf rows, columns;
  int classes, label_type;
  int64_t ignore_index;
  W hot_share, smooth_share;  // 1 - smoothing, smoothing / K
};

// What a thread knows of its pixels, one a row.
template <typename W>
struct Pixels {
  W first[kRows], second[kRows];  // weights of the two source rows
  W largest[kRows], sum[kRows], hot_logit[kRows], smooth[kRows];
  int best[kRows], hot[kRows];  // hot: -1 where nothing counts, -2 where the label is no class
};

// The four sources of a thread.
template <typename S>
struct Sources {
  using W = Wide<S>;
  const S *top, *bottom;  // of class 0
  int64_t plane;
  int first, second;  // columns
  W first_weight, second_weight;
  bool copy;

  // Both source rows of one class at the thread's column.
  __device__ void read(int k, W& upper, W& lower) const {
    const S *a = top + k * plane, *b = bottom + k * plane;
    upper = wide(a[first]);
    if (copy) return;
    lower = first_weight * wide(b[first]) + second_weight * wide(b[second]);
    upper = first_weight * upper + second_weight * wide(a[second]);
  }
  __device__ W logit(W upper, W lower, W first_row, W second_row) const {
    return copy ? upper : first_row * upper + second_row * lower;
  }
};

template <typename S>
__device__ void find_best(const Sources<S>& from, int classes, Pixels<Wide<S>>& p) {
  using W = Wide<S>;
  for (int k = 0; k < classes; ++k) {
    W upper, lower = 0;
    from.read(k, upper, lower);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const W u = from.logit(upper, lower, p.first[r], p.second[r]);
      // Larger, or the first NaN.
      if (k == 0 || (!(u <= p.largest[r]) && p.largest[r] == p.largest[r])) {
        p.largest[r] = u;
        p.best[r] = k;
      }
    }
  }
}

template <typename S>
__device__ void sum_up(const Sources<S>& from, int classes, const Wide<S>* weight, bool smoothed,
                       Pixels<Wide<S>>& p) {
  using W = Wide<S>;
#pragma unroll
  for (int r = 0; r < kRows; ++r) p.sum[r] = p.smooth[r] = p.hot_logit[r] = 0;
  for (int k = 0; k < classes; ++k) {
    W upper, lower = 0;
    from.read(k, upper, lower);
    const W share = weight ? weight[k] : W(1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const W u = from.logit(upper, lower, p.first[r], p.second[r]);
      p.sum[r] += exponential(u - p.largest[r]);
      if (smoothed) p.smooth[r] += share * (p.largest[r] - u);
      if (k == p.hot[r]) p.hot_logit[r] = u;
    }
  }
}

}  // namespace spectralx::cuda
