// What predictions are compared with, made where it is compared and never stored. A target is of one
// cell of one image: `open` is called by the whole block, then `at` for bands and pixels of the cell.
#pragma once
#include "common/patch_norm.h"
#include "cuda/reconstruction/walk.cuh"
#include "cuda/upsample/axis.cuh"

namespace spectralx::cuda {

// Planes of an image [bands, height, width] of I.
template <typename I>
struct Planes {
  const I* data;
  int height, width;

  __device__ __forceinline__ Wide<I> at(int band, int y, int x) const {
    return wide(data[(int64_t(band) * height + y) * width + x]);
  }
};

// The image, or its patch brought to mean 0 and variance 1.
template <typename I>
struct PatchTarget {
  using W = Wide<I>;
  Planes<I> image;
  bool normalize;
  int top, left;
  W mean, scale;

  // `scratch`: a value a warp.
  __device__ void open(const Cell& cell, int bands, W* scratch) {
    top = cell.top, left = cell.left, mean = 0, scale = 1;
    if (!normalize) return;
    const int length = cell.rows * cell.columns * bands;
    const auto over_patch = [&](auto of) {
      W sum = 0;
      Walk walk(cell.columns, cell.rows);
      for (int i = threadIdx.x; i < length; i += kErrorThreads, walk.next())
        sum += of(image.at(walk.slow, top + walk.middle, left + walk.fast));
      return block_sum(sum, scratch);
    };
    mean = over_patch([](W x) { return x; }) / W(length);
    const W spread = over_patch([&](W x) { return (x - mean) * (x - mean); });
    scale = W(1) / sqrt(spread / W(max(length - 1, 1)) + W(kPatchNormEpsilon));
  }
  __device__ __forceinline__ W at(int band, int row, int column) const {
    return scale * (image.at(band, top + row, left + column) - mean);
  }
};

// Where a row or column of a target takes its values from: a nearest neighbour, and two others of
// which the second has `weight`; or, for an average, all from `first` to before `second`.
template <typename W>
struct Place {
  int first, second, nearest;
  W weight;
};

// Where position i of `size` lies among `length`, by nearest neighbour; in float, as
// torch.nn.functional.interpolate does.
__device__ __forceinline__ int nearest(int i, int length, int size) {
  return min(static_cast<int>(float(i) * (float(length) / float(size))), length - 1);
}

// places: [rows] of a cell, then [columns], in shared memory; of(along rows, position).
template <typename W, typename Of>
__device__ __forceinline__ void fill_places(const Cell& cell, Place<W>* places, Of of) {
  for (int i = threadIdx.x; i < cell.rows + cell.columns; i += kErrorThreads)
    places[i] = i < cell.rows ? of(true, cell.top + i) : of(false, cell.left + i - cell.rows);
  __syncthreads();
}

template <typename W, typename I>
__device__ __forceinline__ W bilinear(const Planes<I>& from, int band, const Place<W>& y,
                                      const Place<W>& x) {
  const W above = (W(1) - x.weight) * from.at(band, y.first, x.first) +
                  x.weight * from.at(band, y.first, x.second);
  const W below = (W(1) - x.weight) * from.at(band, y.second, x.first) +
                  x.weight * from.at(band, y.second, x.second);
  return (W(1) - y.weight) * above + y.weight * below;
}

template <typename W>
__device__ __forceinline__ Place<W> between(const AxisOf& axis, int i) {
  return {axis.first(i), axis.second(i), 0, static_cast<W>(axis.weight(i))};
}

// The image, resized bilinearly to height x width.
template <typename I>
struct ResizedTarget {
  using W = Wide<I>;
  Planes<I> image;
  int height, width;
  const Place<W>*rows, *columns;

  __device__ void open(const Cell& cell, Place<W>* places) {
    const AxisOf vertical{image.height, height, false}, across{image.width, width, false};
    fill_places(cell, places, [&](bool row, int i) { return between<W>(row ? vertical : across, i); });
    rows = places, columns = places + cell.rows;
  }
  __device__ __forceinline__ W at(int band, int row, int column) const {
    return bilinear(image, band, rows[row], columns[column]);
  }
};

// The image, repeated to height x width, less `base` resized bilinearly.
template <typename I>
struct DetailTarget {
  using W = Wide<I>;
  Planes<I> image;
  Planes<W> base;
  int height, width;
  const Place<W>*rows, *columns;

  __device__ void open(const Cell& cell, Place<W>* places) {
    const AxisOf vertical{base.height, height, false}, across{base.width, width, false};
    fill_places(cell, places, [&](bool row, int i) {
      Place<W> place = between<W>(row ? vertical : across, i);
      place.nearest = row ? nearest(i, image.height, height) : nearest(i, image.width, width);
      return place;
    });
    rows = places, columns = places + cell.rows;
  }
  __device__ __forceinline__ W at(int band, int row, int column) const {
    const Place<W>&y = rows[row], &x = columns[column];
    return image.at(band, y.nearest, x.nearest) - bilinear(base, band, y, x);
  }
};

// One axis of an average: `length` values, repeated to `full` by nearest neighbour, in `size` windows.
struct Windows {
  int length, full, size;

  __device__ int begin(int i) const { return static_cast<int>(int64_t(i) * full / size); }
  __device__ int end(int i) const {
    return static_cast<int>((int64_t(i + 1) * full + size - 1) / size);
  }
  __device__ int source(int i) const { return nearest(i, length, full); }
};

// The image, repeated to full rows x columns, averaged over areas.
template <typename I>
struct AverageTarget {
  using W = Wide<I>;
  Planes<I> image;
  Windows vertical, across;
  const Place<W>*rows, *columns;

  __device__ void open(const Cell& cell, Place<W>* places) {
    fill_places(cell, places, [&](bool row, int i) {
      const Windows& windows = row ? vertical : across;
      return Place<W>{windows.begin(i), windows.end(i), 0, W(0)};
    });
    rows = places, columns = places + cell.rows;
  }
  __device__ __forceinline__ W at(int band, int row, int column) const {
    const Place<W>&y = rows[row], &x = columns[column];
    W sum = 0;
    for (int i = y.first; i < y.second; ++i) {
      for (int j = x.first; j < x.second; ++j)
        sum += image.at(band, vertical.source(i), across.source(j));
    }
    return sum / W((y.second - y.first) * (x.second - x.first));
  }
};

}  // namespace spectralx::cuda
