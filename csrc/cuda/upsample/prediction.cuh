// Loss, prediction, counts and gradient of upsampled logits, which exist one value at a time.
//
// A block takes one source row of one image and the output rows between it and the next; a thread an
// output column, and kRows rows of it side by side, so that one read of the four sources serves them
// all. The gradient of a block falls on two source rows and is kept as two parts: a second launch
// adds them in order. No float atomics; counts are integers, whose order does not matter.
#pragma once
#include "cuda/common/scalar.cuh"
#include "cuda/upsample/axis.cuh"

namespace spectralx::cuda {

constexpr int kColumns = 128;  // threads of a block, output columns at a time
constexpr int kRows = 4;       // output rows at a time
constexpr int kClasses = 8;    // classes whose gradient is joined at a time
constexpr int kTail = 2 + kColumns / 32;  // ints behind `Segments::starts`
constexpr int64_t kSharedCounts = 64;  // classes up to which a block counts in shared memory

__device__ __forceinline__ int64_t label_at(const void* labels, int type, int64_t i) {
  switch (type) {
    case 0:
      return static_cast<const int64_t*>(labels)[i];
    case 1:
      return static_cast<const int32_t*>(labels)[i];
    case 2:
      return static_cast<const int16_t*>(labels)[i];
    default:
      return static_cast<const uint8_t*>(labels)[i];
  }
}

__device__ __forceinline__ void count(int64_t* cell) {
  atomicAdd(reinterpret_cast<unsigned long long*>(cell), 1ull);
}

template <typename W>
struct PredictionSizes {
  AxisOf rows, columns;
  int classes, label_type;
  int64_t ignore_index;
  W hot_share, smooth_share;  // 1 - smoothing, smoothing / K
};

template <typename S>
struct PredictionTensors {
  const S* logits;
  const void* target;
  const Wide<S>*weight, *upstream;
  Wide<S>*losses, *probability, *loss_parts, *gradient_parts;
  int64_t *label, *confusion;
};

// Elements of W of the block's shared memory before the counts.
__host__ __device__ constexpr int64_t prediction_shared(bool gradient) {
  return 2 * (kColumns / 32) + (gradient ? (4 + 2 * kClasses) * kColumns + kTail : 0);
}

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

template <typename S, bool kGradient>
__global__ void __launch_bounds__(kColumns, sizeof(S) == 8 ? 2 : 3)
    prediction_pass(PredictionSizes<Wide<S>> s, PredictionTensors<S> t) {
  using W = Wide<S>;
  const int tid = threadIdx.x, source_row = blockIdx.x, image = blockIdx.y;
  const int height = s.rows.length, width = s.columns.length;
  const int64_t plane = int64_t(height) * width, block = int64_t(image) * height + source_row;
  W* sums = reinterpret_cast<W*>(dynamic_shared());  // [2, warps]
  W *first = sums + 2 * (kColumns / 32), *second = first + kColumns, *values = second + kColumns;
  Segments segments;
  segments.source = reinterpret_cast<int*>(values + kClasses * 2 * kColumns);
  segments.starts = segments.source + kColumns;
  int* counts = reinterpret_cast<int*>(sums + prediction_shared(kGradient));  // [K, K]
  const bool counts_here = t.confusion != nullptr && s.classes <= kSharedCounts;
  W* parts = kGradient ? t.gradient_parts + block * 2 * s.classes * width : nullptr;
  if (kGradient) {
    for (int64_t i = tid; i < int64_t(2) * s.classes * width; i += kColumns) parts[i] = 0;
  }
  for (int i = tid; counts_here && i < s.classes * s.classes; i += kColumns) counts[i] = 0;
  __syncthreads();

  const int begin = s.rows.begin(source_row), end = s.rows.begin(source_row + 1);
  const int below = s.rows.length == s.rows.size ? source_row : min(source_row + 1, height - 1);
  const bool smoothed = s.smooth_share > W(0), exponentials = t.target || t.probability || kGradient;
  W weight_total = s.classes;
  if (smoothed && t.weight) {
    weight_total = 0;
    for (int k = 0; k < s.classes; ++k) weight_total += t.weight[k];
  }
  W loss_sum = 0, weight_sum = 0;
  for (int tile = 0; tile < s.columns.size; tile += kColumns) {
    const int x = tile + tid, filled = min(kColumns, s.columns.size - tile);
    const bool live = x < s.columns.size;
    Sources<S> from;
    from.top = t.logits + (int64_t(image) * s.classes * height + source_row) * width;
    from.bottom = from.top + int64_t(below - source_row) * width;
    from.plane = plane;
    from.copy = s.rows.length == s.rows.size && s.columns.length == s.columns.size;
    from.first = live ? s.columns.first(x) : 0;
    from.second = live ? s.columns.second(x) : 0;
    const double weight = live ? s.columns.weight(x) : 0.0;
    from.first_weight = W(1.0 - weight);
    from.second_weight = W(weight);
    if (kGradient) {
      const bool folded = from.first == from.second;
      segments.source[tid] = from.first;
      first[tid] = folded ? W(1) : from.first_weight;
      second[tid] = folded ? W(0) : from.second_weight;
      __syncthreads();
      segments.find(filled);
    }
    for (int y = begin; y < end; y += kRows) {
      Pixels<W> p;
      Factors<W> f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool there = live && y + r < end;
        const double row_weight = y + r < end ? s.rows.weight(y + r) : 0.0;
        p.first[r] = W(1.0 - row_weight);
        p.second[r] = W(row_weight);
        p.hot[r] = there ? -1 : -3;
        const int64_t pixel = (int64_t(image) * s.rows.size + y + r) * s.columns.size + x;
        if (there && t.target != nullptr) {
          const int64_t label = label_at(t.target, s.label_type, pixel);
          if (label != s.ignore_index)
            p.hot[r] = label >= 0 && label < s.classes ? static_cast<int>(label) : -2;
        }
      }
      if (live) find_best(from, s.classes, p);
      if (live && exponentials) sum_up(from, s.classes, t.weight, smoothed, p);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (p.hot[r] == -3) continue;
        const int64_t pixel = (int64_t(image) * s.rows.size + y + r) * s.columns.size + x;
        const W upstream = t.upstream ? t.upstream[pixel] : W(1);
        if (t.label) t.label[pixel] = p.best[r];
        if (t.probability) t.probability[pixel] = W(1) / p.sum[r];
        W loss = 0, hot_weight = 0;
        if (p.hot[r] >= 0) {
          const W log_sum = logarithm(p.sum[r]);
          hot_weight = t.weight ? t.weight[p.hot[r]] : W(1);
          loss = s.hot_share * hot_weight * (log_sum + (p.largest[r] - p.hot_logit[r]));
          if (smoothed) loss += s.smooth_share * (weight_total * log_sum + p.smooth[r]);
          weight_sum += hot_weight;
          const int cell = p.hot[r] * s.classes + p.best[r];
          if (counts_here) {
            atomicAdd(counts + cell, 1);
          } else if (t.confusion) {
            count(t.confusion + cell);
          }
        } else if (p.hot[r] == -2) {
          loss = W(NAN);  // never a plausible number
        }
        loss_sum += loss;
        if (t.losses) t.losses[pixel] = loss;
        if (!kGradient) continue;
        if (t.target) {
          const W scale = p.hot[r] >= 0 ? upstream : p.hot[r] == -2 ? W(NAN) : W(0);
          f.hot[r] = p.hot[r];
          f.of_hot[r] = scale * s.hot_share * hot_weight;
          f.of_weight[r] = scale * s.smooth_share;
          f.share[r] = (f.of_hot[r] + f.of_weight[r] * weight_total) / p.sum[r];
        } else {
          f.hot[r] = p.best[r];
          f.of_hot[r] = -upstream / p.sum[r];
          f.of_weight[r] = 0;
          f.share[r] = f.of_hot[r] / p.sum[r];
        }
      }
      if (kGradient) {
        add_gradient<S>(from, s, t.weight, p, f, below == source_row, live, segments, first,
                        second, values, parts);
      }
    }
    if (kGradient) __syncthreads();
  }
  if (t.loss_parts) {
    loss_sum = warp_sum(loss_sum);
    weight_sum = warp_sum(weight_sum);
    if (tid % 32 == 0) {
      sums[tid / 32] = loss_sum;
      sums[kColumns / 32 + tid / 32] = weight_sum;
    }
    __syncthreads();
    if (tid < 2) {
      W sum = 0;
      for (int warp = 0; warp < kColumns / 32; ++warp) sum += sums[tid * (kColumns / 32) + warp];
      t.loss_parts[block * 2 + tid] = sum;
    }
  }
  if (counts_here) {
    __syncthreads();
    for (int i = tid; i < s.classes * s.classes; i += kColumns) {
      if (counts[i] > 0)
        atomicAdd(reinterpret_cast<unsigned long long*>(t.confusion + i),
                  static_cast<unsigned long long>(counts[i]));
    }
  }
}

// loss [2]: the sum of the losses over its divisor, and the divisor. One block.
template <typename W>
__global__ void prediction_loss(const W* parts, int64_t blocks, bool mean, W* loss) {
  W* scratch = reinterpret_cast<W*>(dynamic_shared());  // [threads + 2]
  W* sums = scratch + blockDim.x;
  ordered_sum(parts, static_cast<int>(blocks), 2, sums, scratch);
  __syncthreads();
  if (threadIdx.x > 0) return;
  const W divisor = mean && sums[1] != W(0) ? sums[1] : W(1);
  loss[0] = sums[0] / divisor;
  loss[1] = divisor;
}

// gradient [B, K, h, w]: a row's own part and what the row before left for it, over the divisor,
// times the gradient of the whole loss.
template <typename W>
__global__ void prediction_gradient(const W* parts, const W* loss, const W* factor, int classes,
                                    int height, int width, int64_t size, W* gradient) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= size) return;
  const int64_t x = at % width, y = at / width % height, k = at / width / height % classes;
  const int64_t image = at / width / height / classes, row = int64_t(classes) * width;
  const W* own = parts + (image * height + y) * 2 * row + k * width + x;
  W sum = own[0];
  if (y > 0) sum += own[-row];  // the second part of the row before
  if (loss) sum /= loss[1];
  gradient[at] = factor ? sum * factor[0] : sum;
}

// A grid-stride loop over pixels; counts in shared memory where they fit.
template <typename Count>
__global__ void confusion_counts(const void* prediction, int prediction_type, const void* target,
                                 int target_type, int64_t pixels, int classes,
                                 int64_t ignore_index, int64_t* confusion) {
  Count* counts = reinterpret_cast<Count*>(dynamic_shared());
  const bool here = classes <= kSharedCounts;
  for (int i = threadIdx.x; here && i < classes * classes; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < pixels;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t row = label_at(target, target_type, i);
    const int64_t column = label_at(prediction, prediction_type, i);
    if (row == ignore_index || row < 0 || row >= classes || column < 0 || column >= classes)
      continue;
    const int64_t cell = row * classes + column;
    if (here) {
      atomicAdd(counts + cell, Count(1));
    } else {
      count(confusion + cell);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; here && i < classes * classes; i += blockDim.x) {
    if (counts[i] > 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(confusion + i),
                static_cast<unsigned long long>(counts[i]));
  }
}

}  // namespace spectralx::cuda
