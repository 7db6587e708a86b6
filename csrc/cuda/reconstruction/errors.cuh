// Predictions against their targets: sums of errors by cell, or the predictions' gradient. A block
// takes a cell of one image; cells of weight 0 are not read.
#pragma once
#include "cuda/reconstruction/targets.cuh"

namespace spectralx::cuda {

constexpr int kAtOnce = 4;         // values a thread has under way; of doubles half as many
constexpr int kMeanThreads = 512;  // of the only block of a sum over cells

// Weights [B, cells] of any type of kernels.h.
struct Mask {
  const void* data;
  int type;

  template <typename W>
  __device__ W at(int64_t i) const {
    switch (type) {
      case kFloat:
        return W(static_cast<const float*>(data)[i]);
      case kDouble:
        return W(static_cast<const double*>(data)[i]);
      case kBFloat16:
        return W(wide(static_cast<const __nv_bfloat16*>(data)[i]));
      case kHalf:
        return W(wide(static_cast<const __half*>(data)[i]));
      case 4:
        return W(static_cast<const uint8_t*>(data)[i]);
      default:
        return W(static_cast<const int64_t*>(data)[i]);
    }
  }
};

struct Pixel {
  int band, row, column;  // in a cell
};

// As in kernels.h.
template <typename S>
struct ErrorPass {
  int bands, height, width, cell_rows, cell_columns;
  int down, across;  // cells of an image
  int64_t by_image, by_cell_row, by_cell_column, by_row, by_column, by_band;
  bool absolute, last;  // last: bands are side by side
  Wide<S> factor;
  Mask mask;
  const S *prediction, *upstream;
  const Wide<S>* count;
  Wide<S>* errors;
  S* gradient;

  __device__ Cell cell(int64_t index) const {
    Cell c;
    c.image = index / (down * across);
    const int in_image = static_cast<int>(index % (down * across));
    c.row = in_image / across, c.column = in_image % across;
    c.top = c.row * cell_rows, c.left = c.column * cell_columns;
    c.rows = min(cell_rows, height - c.top), c.columns = min(cell_columns, width - c.left);
    return c;
  }
  // In order of the prediction's memory.
  __device__ Walk walk(const Cell& c) const {
    return Walk(last ? bands : c.columns, last ? c.columns : c.rows);
  }
  __device__ __forceinline__ Pixel pixel(const Walk& w) const {
    return last ? Pixel{w.fast, w.slow, w.middle} : Pixel{w.slow, w.middle, w.fast};
  }
  __device__ __forceinline__ int64_t offset(const Cell& c, const Pixel& of) const {
    return c.image * by_image + c.row * by_cell_row + c.column * by_cell_column +
           of.row * by_row + of.column * by_column + of.band * by_band;
  }
};

// Runs over one cell, of number `index` in the batch. `scratch`: a value a warp.
template <typename S, typename Target>
__device__ void compare_cell(const ErrorPass<S>& p, const Cell& cell, int64_t index, Wide<S> weight,
                             const Target& target, Wide<S>* scratch) {
  using W = Wide<S>;
  const int length = cell.rows * cell.columns * p.bands;
  Walk walk = p.walk(cell);
  if (p.gradient != nullptr) {
    weight *= p.factor * wide(*p.upstream);
    if (p.count != nullptr) weight /= *p.count;
  }
  constexpr int kValues = sizeof(W) == 8 ? kAtOnce / 2 : kAtOnce;
  const W slope = p.absolute ? weight : W(2) * weight;
  W total = 0;
  for (int i = threadIdx.x; i < length; i += kValues * kErrorThreads) {
    int64_t at[kValues];
    W apart[kValues];
#pragma unroll
    for (int n = 0; n < kValues; ++n) {
      // Beyond the end the cell's first value is read, and not used: no load waits for a branch.
      const Pixel of = i + n * kErrorThreads < length ? p.pixel(walk) : Pixel{0, 0, 0};
      at[n] = p.offset(cell, of);
      apart[n] = wide(p.prediction[at[n]]) - target.at(of.band, of.row, of.column);
      walk.next();
    }
#pragma unroll
    for (int n = 0; n < kValues; ++n) {
      if (i + n * kErrorThreads >= length) break;
      if (p.gradient == nullptr) {
        const W error = p.absolute ? (apart[n] < W(0) ? W(-1) : W(1)) : apart[n];
        total += error * apart[n];
      } else {
        const W signs = (apart[n] > W(0) ? slope : W(0)) - (apart[n] < W(0) ? slope : W(0));
        p.gradient[at[n]] = narrow<S>(p.absolute ? signs : slope * apart[n]);
      }
    }
  }
  if (p.gradient != nullptr) return;
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) p.errors[index] = total;
}

// What an unread cell leaves.
template <typename S>
__device__ void clear_cell(const ErrorPass<S>& p, const Cell& cell, int64_t index) {
  if (p.gradient == nullptr) {
    if (threadIdx.x == 0) p.errors[index] = 0;
    return;
  }
  const int length = cell.rows * cell.columns * p.bands;
  Walk walk = p.walk(cell);
  for (int i = threadIdx.x; i < length; i += kErrorThreads, walk.next())
    p.gradient[p.offset(cell, p.pixel(walk))] = narrow<S>(0);
}

// `make(cell)` gives the target of the cell, once it is known to be read.
template <typename S, typename Make>
__device__ __forceinline__ void run_cell(const ErrorPass<S>& p, int64_t index, Wide<S>* scratch,
                                         Make make) {
  const Cell cell = p.cell(index);
  const Wide<S> weight = p.mask.data != nullptr ? p.mask.template at<Wide<S>>(index) : Wide<S>(1);
  if (weight == Wide<S>(0)) {
    clear_cell(p, cell, index);
  } else {
    compare_cell(p, cell, index, weight, make(cell), scratch);
  }
}

// Images [B, bands, height, width].
template <typename I>
struct Images {
  const I* data;
  int height, width;

  __device__ Planes<I> of(int64_t image, int bands) const {
    return {data + image * bands * height * width, height, width};
  }
};

template <typename S, typename I>
__global__ void __launch_bounds__(kErrorThreads)
    patch_errors(ErrorPass<S> p, Images<I> images, bool normalize) {
  using W = Wide<S>;
  W* scratch = reinterpret_cast<W*>(dynamic_shared());  // [kErrorWarps]
  run_cell(p, blockIdx.x, scratch, [&](const Cell& cell) {
    PatchTarget<I> target{images.of(cell.image, p.bands), normalize, 0, 0, 0, 1};
    target.open(cell, p.bands, scratch);
    return target;
  });
}

template <typename S, typename I>
__global__ void __launch_bounds__(kErrorThreads) resized_errors(ErrorPass<S> p, Images<I> images) {
  using W = Wide<S>;
  W* scratch = reinterpret_cast<W*>(dynamic_shared());  // [kErrorWarps], and places
  run_cell(p, blockIdx.x, scratch, [&](const Cell& cell) {
    ResizedTarget<I> target{images.of(cell.image, p.bands), p.height, p.width, nullptr, nullptr};
    target.open(cell, reinterpret_cast<Place<W>*>(scratch + kErrorWarps));
    return target;
  });
}

// Blocks of `high` come first; a pass that is not wanted has none.
template <typename S, typename I>
__global__ void __launch_bounds__(kErrorThreads)
    band_errors(ErrorPass<S> high, ErrorPass<S> low, int64_t of_high, Images<I> images,
                Images<Wide<S>> base, Windows vertical, Windows across) {
  using W = Wide<S>;
  W* scratch = reinterpret_cast<W*>(dynamic_shared());  // [kErrorWarps], and places
  auto* places = reinterpret_cast<Place<W>*>(scratch + kErrorWarps);
  if (blockIdx.x < of_high) {
    run_cell(high, blockIdx.x, scratch, [&](const Cell& cell) {
      DetailTarget<I> target{images.of(cell.image, high.bands), base.of(cell.image, high.bands),
                             high.height, high.width, nullptr, nullptr};
      target.open(cell, places);
      return target;
    });
  } else {
    run_cell(low, blockIdx.x - of_high, scratch, [&](const Cell& cell) {
      AverageTarget<I> target{images.of(cell.image, low.bands), vertical, across, nullptr, nullptr};
      target.open(cell, places);
      return target;
    });
  }
}

// The sum of n weights, or 1 where it is 0; by the whole block.
template <typename W>
__device__ W count_of(const Mask& mask, int64_t n, W* scratch) {
  W sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += mask.template at<W>(i);
  sum = block_sum(sum, scratch);
  return sum == W(0) ? W(1) : sum;
}

template <typename W>
__global__ void __launch_bounds__(kMeanThreads) mask_count(Mask mask, int64_t n, W* count) {
  const W sum = count_of(mask, n, reinterpret_cast<W*>(dynamic_shared()));
  if (threadIdx.x == 0) *count = sum;
}

// base, wide [planes, height, width]: averages of the repeated image, a warp each; the last block
// adds up the mask where `count` is given.
template <typename I>
__global__ void __launch_bounds__(kErrorThreads)
    band_base(Images<I> images, int64_t planes, Windows vertical, Windows across, Mask mask,
              int64_t cells, Wide<I>* base, Wide<I>* count) {
  using W = Wide<I>;
  if (count != nullptr && blockIdx.x == gridDim.x - 1) {
    const W sum = count_of(mask, cells, reinterpret_cast<W*>(dynamic_shared()));
    if (threadIdx.x == 0) *count = sum;
    return;
  }
  const int64_t at = int64_t(blockIdx.x) * kErrorWarps + threadIdx.x / 32;
  if (at >= planes * vertical.size * across.size) return;  // the whole warp
  const int64_t plane = at / across.size / vertical.size;
  const int y = static_cast<int>(at / across.size % vertical.size);
  const int x = static_cast<int>(at % across.size);
  const Planes<I> image = images.of(plane, 1);
  const int top = vertical.begin(y), left = across.begin(x), columns = across.end(x) - left;
  const int area = (vertical.end(y) - top) * columns;
  W sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < area; i += 32)
    sum += image.at(0, vertical.source(top + i / columns), across.source(left + i % columns));
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) base[at] = sum / W(area);
}

// loss: (first_factor first + second_factor second) times the mask over its count, or without it as
// it is. One block.
template <typename S>
__global__ void __launch_bounds__(kMeanThreads)
    mean_error(const Wide<S>* first, const Wide<S>* second, Wide<S> first_factor,
               Wide<S> second_factor, Mask mask, int64_t n, S* loss) {
  using W = Wide<S>;
  W* scratch = reinterpret_cast<W*>(dynamic_shared());  // a value a warp
  const bool weighted = mask.data != nullptr;
  W total = 0, count = 0;
  for (int64_t i = threadIdx.x; i < n; i += kMeanThreads) {
    W value = first_factor * first[i];
    if (second != nullptr) value += second_factor * second[i];
    const W share = weighted ? mask.template at<W>(i) : W(1);
    count += share;
    total += share * value;  // of what was not read the errors are 0
  }
  total = block_sum(total, scratch);
  count = block_sum(count, scratch);
  if (threadIdx.x > 0) return;
  *loss = narrow<S>(weighted && count != W(0) ? total / count : total);
}

}  // namespace spectralx::cuda
