// The gradient of prediction.cuh: formed once more by class, gathered from output to source columns.
#pragma once
#include "cuda/upsample/prediction_pixels.cuh"

namespace spectralx::cuda {

constexpr int kClasses = 8;               // classes whose gradient is joined at a time
constexpr int kTail = 2 + kColumns / 32;  // ints behind `Segments::starts`

// What the gradient needs of each pixel: of_softmax softmax[c] - of_weight weight[c], less of_hot at
// c = hot, as csrc/cpu/upsample/pixels.h has it.
template <typename W>
struct Factors {
  W share[kRows], of_hot[kRows], of_weight[kRows];  // share: of exp(u - largest)
  int hot[kRows];
};

// The columns of a tile in segments of one source column each; in shared memory.
struct Segments {
  int *source, *starts;  // [kColumns], of a column; [count + 1], first columns
  int count;

  // From `source`. By the whole block; `starts` takes kColumns + kTail ints.
  __device__ void find(int filled) {
    const int t = threadIdx.x, warp = t / 32, lane = t % 32;
    const bool opens = t < filled && (t == 0 || source[t - 1] != source[t]);
    const unsigned votes = __ballot_sync(0xffffffffu, opens);
    int* totals = starts + kColumns + 2;  // of the warps
    if (lane == 0) totals[warp] = __popc(votes);
    __syncthreads();
    int place = __popc(votes & ((1u << lane) - 1u));
    for (int other = 0; other < warp; ++other) place += totals[other];
    if (opens) starts[place] = t;
    count = 0;
    for (int other = 0; other < kColumns / 32; ++other) count += totals[other];
    if (t == 0) starts[count] = filled;
    __syncthreads();
  }
  __device__ int of(int segment) const { return source[starts[segment]]; }
};

template <typename W>
__device__ __forceinline__ W weighted(const W* weight, const W* value, int begin, int end) {
  W sum = 0;
  for (int x = begin; x < end; ++x) sum += weight[x] * value[x];
  return sum;
}

// Adds the gradient of the thread's columns to the block's parts. `first`, `second`: in shared
// memory, of the tile's columns, the weights as the gradient is shared out.
template <typename S>
__device__ void add_gradient(const Sources<S>& from, const PredictionSizes<Wide<S>>& s,
                             const Wide<S>* weight, const Pixels<Wide<S>>& p,
                             const Factors<Wide<S>>& f, bool bottom_is_top, bool live,
                             const Segments& segments, const Wide<S>* first,
                             const Wide<S>* second, Wide<S>* values, Wide<S>* parts) {
  using W = Wide<S>;
  const int t = threadIdx.x, width = s.columns.length, count = segments.count;
  const bool spreads = s.columns.length != s.columns.size;  // to a second source column
  const int* starts = segments.starts;
  for (int begin = 0; begin < s.classes; begin += kClasses) {
    const int end = min(begin + kClasses, s.classes);
    for (int k = begin; live && k < end; ++k) {
      W upper, lower = 0, to_top = 0, to_bottom = 0;
      from.read(k, upper, lower);
      const W share = weight ? weight[k] : W(1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const W u = from.logit(upper, lower, p.first[r], p.second[r]);
        W grad = f.share[r] * exponential(u - p.largest[r]) - f.of_weight[r] * share;
        if (k == f.hot[r]) grad -= f.of_hot[r];
        if (p.hot[r] == -3) grad = 0;  // no row
        to_top += (bottom_is_top ? p.first[r] + p.second[r] : p.first[r]) * grad;
        if (!bottom_is_top) to_bottom += p.second[r] * grad;
      }
      values[((k - begin) * 2) * kColumns + t] = to_top;
      values[((k - begin) * 2 + 1) * kColumns + t] = to_bottom;
    }
    __syncthreads();
    // To every segment's source column what falls on it: from its own columns and from those of the
    // source column before; and to the next source column, if that has no segment, from its own.
    for (int i = t; i < (end - begin) * 2 * count; i += kColumns) {
      const int segment = i % count, plane = i / count, column = segments.of(segment);
      const int open = starts[segment], close = starts[segment + 1];
      const W* value = values + plane * kColumns;
      W* part = parts + (int64_t(plane % 2) * s.classes + begin + plane / 2) * width + column;
      W sum = 0;
      if (spreads && segment > 0 && segments.of(segment - 1) == column - 1)
        sum = weighted(second, value, starts[segment - 1], open);
      part[0] += sum + weighted(first, value, open, close);
      const bool last = segment == count - 1 || segments.of(segment + 1) != column + 1;
      if (spreads && last && column + 1 < width) part[1] += weighted(second, value, open, close);
    }
    __syncthreads();
  }
}

}  // namespace spectralx::cuda
