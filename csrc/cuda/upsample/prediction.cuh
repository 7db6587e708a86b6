// Loss, prediction, counts and gradient of upsampled logits, which exist one value at a time.
//
// A block takes one source row of one image and the output rows between it and the next; a thread an
// output column, and kRows rows of it side by side, so that one read of the four sources serves them
// all. The gradient of a block falls on two source rows and is kept as two parts: a second launch
// adds them in order. No float atomics; counts are integers, whose order does not matter.
#pragma once
#include "cuda/upsample/prediction_gradient.cuh"

namespace spectralx::cuda {

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
