// One pass over predictions and their targets: sums of errors by cell, or the predictions' gradient.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <memory>

#include "cpu/reconstruction/targets.h"

namespace spectralx::cpu {

enum class Layout { kPlanar, kInterleaved, kPatches };

// Predicted pixels [B, C, H, W] in a grid of cells: patches, or bands of rows. Planar: as they are
// read; interleaved: channels last; patches: [B, L, rows * columns * C] of cells whose bands are
// side by side.
struct Pixels {
  Layout layout;
  int64_t batch, bands, height, width;
  int64_t cell_height, cell_width;  // the last row of cells may be shorter

  int64_t rows() const { return (height + cell_height - 1) / cell_height; }
  int64_t columns() const { return width / cell_width; }
  int64_t cells() const { return rows() * columns(); }

  // Where the run of pixels from column x on begins; x is in `cell`, a column of cells.
  int64_t at(int64_t image, int64_t band, int64_t y, int64_t x, int64_t cell) const {
    switch (layout) {
      case Layout::kPlanar:
        return ((image * bands + band) * height + y) * width + x;
      case Layout::kInterleaved:
        return ((image * height + y) * width + x) * bands;
      default:
        const int64_t patch = (image * rows() + y / cell_height) * columns() + cell;
        return ((patch * cell_height + y % cell_height) * cell_width + x - cell * cell_width) *
               bands;
    }
  }
};

// How a map [B, C, H, W] lies; `map` is made contiguous where it is neither.
inline Layout layout_of(at::Tensor& map) {
  if (map.is_contiguous()) return Layout::kPlanar;
  if (map.is_contiguous(at::MemoryFormat::ChannelsLast)) return Layout::kInterleaved;
  map = map.contiguous();
  return Layout::kPlanar;
}

struct ErrorPass {
  Pixels pixels;
  at::Tensor prediction;  // any floating type
  bool absolute = false;  // |p - t|, else (p - t)^2
  at::Tensor weight;      // [B, cells], double: cells of 0 are not read; undefined: ones
  // The derivative of a cell's sum of errors with respect to a prediction is written times
  // factor * weight.
  double factor = 1;
  at::Tensor errors;    // [B, cells], double: not times the weight
  at::Tensor gradient;  // as prediction, any floating type
};

template <typename T>
using MakeTarget = std::function<std::unique_ptr<Target<T>>()>;  // one a thread

template <typename T>
void run(const ErrorPass& pass, const MakeTarget<T>& make_target);

}  // namespace spectralx::cpu
