// Where the positions of an upsampled axis come from, and the order in which an output row's columns
// are computed. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace spectralx::cpu {

constexpr int kLanes = 16;  // pixels that are computed side by side

// Position i of an axis is (1 - weight[i]) source[first[i]] + weight[i] source[first[i] + step], past
// the end the last source again: torch.nn.functional.interpolate, "bilinear". Coordinates in double.
struct Axis {
  int64_t length, step;  // step 0: the axis keeps its size
  std::vector<int64_t> first;
  std::vector<double> weight;

  Axis(int64_t length_, int64_t size, bool align_corners)
      : length(length_), step(length_ == size ? 0 : 1), first(size), weight(size) {
    const double scale = !align_corners ? static_cast<double>(length) / static_cast<double>(size)
                         : size > 1     ? static_cast<double>(length - 1) / static_cast<double>(size - 1)
                                        : 0.0;
    for (int64_t i = 0; i < size; ++i) {
      const double middle = static_cast<double>(i) + 0.5;
      const double at = step == 0        ? static_cast<double>(i)
                        : align_corners  ? scale * static_cast<double>(i)
                                         : std::max(scale * middle - 0.5, 0.0);
      first[i] = std::min(static_cast<int64_t>(at), length - 1);
      weight[i] = std::min(std::max(at - static_cast<double>(first[i]), 0.0), 1.0);
    }
  }
};

// The columns of an output row in slots, kLanes a tile. Where a tile allows it, slot j reads source
// column base + j, so that neither reading sources nor adding to their gradients takes a gather: the
// first pixels of all source columns, then all second ones and so on, with slots left empty where a
// source column has fewer. Where too many would be empty (a map made smaller) the tile gathers.
template <typename T>
struct Slots {
  std::vector<int32_t> column;            // of the output; -1 for an empty slot
  std::vector<int32_t> source;            // first source column
  std::vector<int32_t> base;              // of each tile; -1: it gathers
  std::vector<T> first_weight, second_weight;  // 0 in an empty slot

  explicit Slots(const Axis& axis) {
    // A tile that gathers takes about as long as kGather that do not.
    constexpr size_t kGather = 4;
    const auto size = static_cast<int64_t>(axis.first.size());
    std::vector<std::vector<int32_t>> ranked;  // [rank among the columns of one source]
    for (int64_t i = 0, rank = 0; i < size; ++i) {
      rank = i > 0 && axis.first[i] == axis.first[i - 1] ? rank + 1 : 0;
      if (rank == static_cast<int64_t>(ranked.size())) ranked.emplace_back();
      ranked[rank].push_back(static_cast<int32_t>(i));
    }
    std::vector<std::vector<int32_t>> sparse;  // tiles with few columns
    size_t left = 0;
    for (const auto& columns : ranked) {
      for (size_t begin = 0, end = 0; begin < columns.size(); begin = end) {
        const int64_t first = axis.first[columns[begin]];
        while (end < columns.size() && axis.first[columns[end]] < first + kLanes) ++end;
        std::vector<int32_t> tile(columns.begin() + begin, columns.begin() + end);
        if (tile.size() > kLanes / kGather) {
          read_alike(axis, tile);
        } else {
          left += tile.size();
          sparse.push_back(std::move(tile));
        }
      }
    }
    const bool gather = (left + kLanes - 1) / kLanes * kGather < sparse.size();
    size_t gathered = 0;
    for (const auto& tile : sparse) {
      if (!gather) read_alike(axis, tile);
      for (size_t i = 0; gather && i < tile.size(); ++i, ++gathered) {
        if (gathered % kLanes == 0) open(-1);
        fill(axis, static_cast<int64_t>(gathered % kLanes), tile[i]);
      }
    }
  }

  int64_t tiles() const { return static_cast<int64_t>(base.size()); }
  int64_t size() const { return static_cast<int64_t>(column.size()); }

 private:
  void read_alike(const Axis& axis, const std::vector<int32_t>& columns) {
    const int64_t first = axis.first[columns[0]];
    open(static_cast<int32_t>(first));
    for (const int32_t column : columns) fill(axis, axis.first[column] - first, column);
  }
  void open(int32_t first) {
    base.push_back(first);
    column.resize(column.size() + kLanes, -1);
    source.resize(column.size(), 0);
    first_weight.resize(column.size(), T(0));
    second_weight.resize(column.size(), T(0));
  }
  void fill(const Axis& axis, int64_t lane, int32_t at) {
    const int64_t slot = size() - kLanes + lane;
    column[slot] = at;
    source[slot] = static_cast<int32_t>(axis.first[at]);
    first_weight[slot] = static_cast<T>(1.0 - axis.weight[at]);
    second_weight[slot] = static_cast<T>(axis.weight[at]);
  }
};

}  // namespace spectralx::cpu
