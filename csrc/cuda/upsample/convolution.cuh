// What lies between the products of an upsampled convolution: Z [B, h, w, ky, kx, O] summed into
// out [B, H', W', O], and the way back, each value gathered by one thread in a fixed order.
//
// A thread takes one pack of channels of one column. Forward it runs down kOutRows output rows at a
// time: a line of Z is summed over the columns' taps once and serves all of them. Backward it holds
// the sums of kGroup x kGroup taps, so that one read of a gradient serves them all.
#pragma once
#include "cuda/common/scalar.cuh"
#include "cuda/upsample/axis.cuh"
#include "cuda/common/norm.cuh"

namespace spectralx::cuda {

constexpr int kOutRows = 8;   // output rows whose sums a thread holds
constexpr int kTapGroup = 3;  // taps of either axis whose sums a thread holds backward

// What one position of the upsampled axis takes: two halves of the same source where it takes only
// one, so that no zero meets an infinity.
template <typename W>
struct alignas(16) Place {
  W first_weight, second_weight;
  int first, second;

  __device__ __forceinline__ W of(int line) const {
    return (first == line ? first_weight : W(0)) + (second == line ? second_weight : W(0));
  }
};

// An axis with its taps: output `out` takes through tap `t` what position out + t - padding takes.
template <typename W>
struct TapAxis {
  AxisOf axis;
  int taps, padding, outs;
  Place<W>* places;  // [size]
  int* begins;       // [length + 1]: the first position whose first source is that line or later
};

template <typename W>
__device__ void fill_places(const TapAxis<W>& a, int i) {
  if (i < a.axis.size) {
    Place<W> place;
    place.first = a.axis.first(i);
    place.second = a.axis.second(i);
    double weight = a.axis.weight(i);
    if (weight == 0.0) place.second = place.first;
    if (place.second == place.first) weight = 0.5;
    place.first_weight = W(1.0 - weight);
    place.second_weight = W(weight);
    a.places[i] = place;
  }
  if (i <= a.axis.length) a.begins[i] = a.axis.begin(i);
}

template <typename W>
__global__ void tap_places(TapAxis<W> rows, TapAxis<W> columns) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  fill_places(rows, i);
  fill_places(columns, i);
}

// How blocks cover images x lines x columns x packs x groups of taps, all in the grid's first
// dimension. Neighbouring threads take neighbouring packs, or columns where memory lies so.
struct Tiling {
  int columns, packs;  // of a block: kTile together
  bool channels_last;
  int column_tiles, pack_tiles, lines, groups;

  __host__ __device__ int64_t blocks(int64_t batch) const {
    return batch * lines * column_tiles * pack_tiles * groups;
  }
};

struct Task {
  int64_t image;
  int line, column, pack, group;

  __device__ explicit Task(const Tiling& t) {
    int64_t block = blockIdx.x;
    const int tid = threadIdx.x;
    group = static_cast<int>(block % t.groups), block /= t.groups;
    pack = static_cast<int>(block % t.pack_tiles) * t.packs, block /= t.pack_tiles;
    column = static_cast<int>(block % t.column_tiles) * t.columns, block /= t.column_tiles;
    line = static_cast<int>(block % t.lines), image = block / t.lines;
    pack += t.channels_last ? tid % t.packs : tid / t.columns;
    column += t.channels_last ? tid / t.packs : tid % t.columns;
  }
};

// A map in any layout. packs: 16 bytes of channels can be taken at once.
template <typename S>
struct Map {
  S* data;
  int64_t image, channel, row, column;  // strides
  bool packs;
};

template <typename S>
struct Epilogue {
  const Wide<S>* bias;  // [O] or null
  Map<const S> addend;  // data may be null
  bool relu;
};

// A thread's eight rows, of what tap_sum says: left in sums as they are stored.
template <typename S, int N>
__device__ __forceinline__ void sum_rows(const Task& task, const TapAxis<Wide<S>>& rows,
                                         const TapAxis<Wide<S>>& columns, int channels, const S* z,
                                         const Epilogue<S>& epilogue, const Map<S>& out,
                                         Wide<S> (&sums)[kOutRows][N]) {
  using W = Wide<S>;
  const int x = task.column, c = task.pack * N, y0 = task.line * kOutRows;
  const int end = min(kOutRows, rows.outs - y0), width = columns.axis.length;
  const int64_t pixel = int64_t(rows.taps) * columns.taps * channels;
  const S* image = z + task.image * rows.axis.length * width * pixel + c;
  for (int s = 0; s < rows.taps; ++s) {
    const int at = y0 + s - rows.padding;  // of the first row
    const int low = max(at, 0), high = min(at + end, rows.axis.size) - 1;
    if (low > high) continue;
    Place<W> places[kOutRows];
#pragma unroll
    for (int r = 0; r < kOutRows; ++r) {
      const bool there = at + r >= low && at + r <= high;
      places[r] = there ? rows.places[at + r] : Place<W>{W(0), W(0), -1, -1};
    }
    const int last = rows.places[high].second;
    for (int line = rows.places[low].first; line <= last; ++line) {
      bool taken = false;
#pragma unroll
      for (int r = 0; r < kOutRows; ++r)
        taken |= places[r].first == line || places[r].second == line;
      if (!taken) continue;
      W across[N] = {};
      const S* from = image + int64_t(line) * width * pixel + int64_t(s) * columns.taps * channels;
#pragma unroll 3
      for (int t = 0; t < columns.taps; ++t) {
        const int place_at = x + t - columns.padding;
        if (place_at < 0 || place_at >= columns.axis.size) continue;
        const Place<W> place = columns.places[place_at];
        W first[N], second[N];
        load<S, N>(from + place.first * pixel + t * channels, first);
        load<S, N>(from + place.second * pixel + t * channels, second);
#pragma unroll
        for (int i = 0; i < N; ++i)
          across[i] += place.first_weight * first[i] + place.second_weight * second[i];
      }
#pragma unroll
      for (int r = 0; r < kOutRows; ++r) {
        const W weight = places[r].of(line);
        if (weight == W(0)) continue;  // keeps what is not finite in its surroundings
#pragma unroll
        for (int i = 0; i < N; ++i) sums[r][i] += weight * across[i];
      }
    }
  }
  const Map<const S>& addend = epilogue.addend;
#pragma unroll
  for (int r = 0; r < kOutRows; ++r) {
    if (r >= end) break;
    if (epilogue.bias) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[r][i] += epilogue.bias[c + i];
    }
    if (addend.data) {
      const S* at = addend.data + task.image * addend.image + (y0 + r) * addend.row +
                    x * addend.column + c * addend.channel;
      W more[N];
      if (addend.packs) {
        load<S, N>(at, more);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) more[i] = wide(at[i * addend.channel]);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) sums[r][i] += more[i];
    }
    if (epilogue.relu) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[r][i] = sums[r][i] < W(0) ? W(0) : sums[r][i];
    }
    S* to = out.data + task.image * out.image + (y0 + r) * out.row + x * out.column +
            c * out.channel;
    if (out.packs) {
      store<S, N>(to, sums[r]);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i * out.channel] = narrow<S>(sums[r][i]);
    }
  }
}

// out = the sum of Z, + bias + addend, the larger of that and 0; NaN kept. With kMoments also the
// mean of what a block has stored and the squared deviations from it, by channel: a part of `parts`.
template <typename S, int N, bool kMoments>
__global__ void __launch_bounds__(kTile, 2)
    tap_sum(Tiling tiling, TapAxis<Wide<S>> rows, TapAxis<Wide<S>> columns, int channels, const S* z,
            Epilogue<S> epilogue, Map<S> out, MomentParts<Wide<S>> parts) {
  using W = Wide<S>;
  const Task task(tiling);
  const int c = task.pack * N;
  const bool here = task.column < columns.outs && c < channels;
  W sums[kOutRows][N] = {};
  if (here) sum_rows(task, rows, columns, channels, z, epilogue, out, sums);
  if constexpr (kMoments) {
    const int tid = threadIdx.x, end = min(kOutRows, rows.outs - task.line * kOutRows);
    W* means = reinterpret_cast<W*>(dynamic_shared());  // [kTile, N], and as many squares
    W* squares = means + kTile * N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      W mean = 0, square = 0;
#pragma unroll
      for (int r = 0; r < kOutRows; ++r) {
        sums[r][i] = wide(narrow<S>(sums[r][i]));
        if (r < end) mean += sums[r][i];
      }
      mean /= W(end);
#pragma unroll
      for (int r = 0; r < kOutRows; ++r)
        if (r < end) square += (sums[r][i] - mean) * (sums[r][i] - mean);
      means[tid * N + i] = mean;
      squares[tid * N + i] = square;
    }
    __syncthreads();
    // The first column's threads go through the others, all of which have `end` values.
    const int first = tiling.channels_last ? tid / tiling.packs : tid % tiling.columns;
    if (first != 0 || !here) return;
    const int step = tiling.channels_last ? tiling.packs : 1;
    const int count = min(tiling.columns, columns.outs - task.column);
    const int64_t part = (task.image * tiling.lines + task.line) * tiling.column_tiles +
                         task.column / tiling.columns;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      W mean = 0, square = 0;
      for (int k = 0; k < count; ++k) mean += means[(tid + k * step) * N + i];
      mean /= W(count);
      for (int k = 0; k < count; ++k) {
        const W off = means[(tid + k * step) * N + i] - mean;
        square += squares[(tid + k * step) * N + i] + W(end) * off * off;
      }
      parts.values[part * 2 * channels + c + i] = mean;
      parts.values[(part * 2 + 1) * channels + c + i] = square;
    }
    if (task.pack == 0) parts.counts[part] = W(end * count);
  }
}

// Outputs [first, last) that take from `line` through some tap from `tap` to tap + G - 1.
template <typename W>
__device__ __forceinline__ void reach(const TapAxis<W>& a, int line, int tap, int group, int& first,
                                      int& last) {
  const int low = a.begins[max(line - 1, 0)], high = a.begins[line + 1];
  first = max(low - (tap + group - 1) + a.padding, 0);
  last = min(high - tap + a.padding, a.outs);
}

// Weight of `line` in position `at` of the upsampled axis.
template <typename W>
__device__ __forceinline__ W weight_of(const TapAxis<W>& a, int at, int line) {
  return at >= 0 && at < a.axis.size ? a.places[at].of(line) : W(0);
}

// dz [B, h, w, ky, kx, O]: what the outputs that took from it say, ascending, of taps G x G.
template <typename S, int N, int G>
__global__ void __launch_bounds__(kTile, 2)
    tap_gather(Tiling tiling, TapAxis<Wide<S>> rows, TapAxis<Wide<S>> columns, int channels,
               const S* grad, S* dz) {
  using W = Wide<S>;
  const Task task(tiling);
  const int line = task.line, column = task.column, c = task.pack * N;
  const int across_groups = static_cast<int>(ceil_div(columns.taps, G));
  const int s0 = task.group / across_groups * G, t0 = task.group % across_groups * G;
  if (column >= columns.axis.length || c >= channels) return;
  int top, bottom, left, right;
  reach(rows, line, s0, G, top, bottom);
  reach(columns, column, t0, G, left, right);
  const int64_t row = int64_t(columns.outs) * channels;
  const S* image = grad + task.image * rows.outs * row + c;
  W sums[G][G][N] = {};
  // Weights slide: output y + 1 takes through tap s what output y takes through tap s + 1.
  W across[G];
#pragma unroll
  for (int t = 0; t < G; ++t)
    across[t] = weight_of(columns, left + t0 + t - 1 - columns.padding, column);
  for (int x = left; x < right; ++x) {
#pragma unroll
    for (int t = 0; t + 1 < G; ++t) across[t] = across[t + 1];
    across[G - 1] = weight_of(columns, x + t0 + G - 1 - columns.padding, column);
    bool any = false;
#pragma unroll
    for (int t = 0; t < G; ++t) any |= across[t] != W(0);
    if (!any) continue;
    W lines[G][N] = {}, down[G];
#pragma unroll
    for (int s = 0; s < G; ++s) down[s] = weight_of(rows, top + s0 + s - 1 - rows.padding, line);
    for (int y = top; y < bottom; ++y) {
#pragma unroll
      for (int s = 0; s + 1 < G; ++s) down[s] = down[s + 1];
      down[G - 1] = weight_of(rows, y + s0 + G - 1 - rows.padding, line);
      bool taken = false;
#pragma unroll
      for (int s = 0; s < G; ++s) taken |= down[s] != W(0);
      if (!taken) continue;
      W values[N];
      load<S, N>(image + y * row + int64_t(x) * channels, values);
#pragma unroll
      for (int s = 0; s < G; ++s) {
#pragma unroll
        for (int i = 0; i < N; ++i) lines[s][i] += down[s] * values[i];
      }
    }
#pragma unroll
    for (int s = 0; s < G; ++s) {
#pragma unroll
      for (int t = 0; t < G; ++t) {
#pragma unroll
        for (int i = 0; i < N; ++i) sums[s][t][i] += across[t] * lines[s][i];
      }
    }
  }
  S* to = dz + ((task.image * rows.axis.length + line) * columns.axis.length + column) *
                   (int64_t(rows.taps) * columns.taps * channels) + c;
#pragma unroll
  for (int s = 0; s < G; ++s) {
#pragma unroll
    for (int t = 0; t < G; ++t) {
      if (s0 + s < rows.taps && t0 + t < columns.taps)
        store<S, N>(to + (int64_t(s0 + s) * columns.taps + t0 + t) * channels, sums[s][t]);
    }
  }
}

// parts [gridDim.y, channels]: sums over `share` rows of x [rows, channels]. Threads: packs of
// channels, then rows in turn; those of a pack are added in order.
template <typename S, int N>
__global__ void __launch_bounds__(kTile)
    channel_parts(const S* x, int64_t rows, int64_t share, int channels, int packs,
                  Wide<S>* parts) {
  using W = Wide<S>;
  W* shared = reinterpret_cast<W*>(dynamic_shared());  // [kTile, N]
  const int tid = threadIdx.x, lanes = kTile / packs, lane = tid / packs;
  const int c = (static_cast<int>(blockIdx.x) * packs + tid % packs) * N;
  const int64_t begin = blockIdx.y * share, end = min(begin + share, rows);
  W sums[N] = {};
  for (int64_t i = begin + lane; c < channels && i < end; i += lanes) {
    W values[N];
    load<S, N>(x + i * channels + c, values);
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] += values[j];
  }
#pragma unroll
  for (int j = 0; j < N; ++j) shared[tid * N + j] = sums[j];
  __syncthreads();
  if (lane > 0 || c >= channels) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    W sum = 0;
    for (int i = 0; i < lanes; ++i) sum += shared[(i * packs + tid) * N + j];
    parts[int64_t(blockIdx.y) * channels + c + j] = sum;
  }
}

}  // namespace spectralx::cuda
