// What pixel_head.cpp works on: sizes, weights as its products take them, and rows of a strip.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/reconstruction/strips.h"

namespace spectralx::cpu::strips {

struct Sizes {
  int64_t batch, ins, height, width;  // what comes in
  int64_t up, wide, half;             // first stride; channels of its lines, and half as many
  int64_t mixed, down, bands;         // channels before the last convolution; last stride; bands out
  int64_t lines, line;                // of a map, and pixels of a line
  int64_t points;                     // values out of a pixel of a line: down down bands
  int64_t strip;                      // rows of what comes in

  Sizes(const Tensor& x, const Tensor& expand, const Tensor& grouped, const Tensor& mix,
        const Tensor& project, int64_t itemsize) {
    const auto want = [](bool holds, const char* name, const Tensor& found, const char* expected) {
      TORCH_CHECK_VALUE(holds, name, ": got shape ", found.sizes(), ", expected ", expected);
    };
    want(x.dim() == 4, "x", x, "[batch, channels, height, width]");
    want(expand.dim() == 4 && expand.size(0) == x.size(1) && expand.size(1) % 2 == 0 &&
             expand.size(2) == expand.size(3),
         "expand", expand, "[channels, even, k, k]");
    want(grouped.sizes() == at::IntArrayRef({expand.size(1) / 2, 2, 3, 3}), "grouped", grouped,
         "[half of expand's, 2, 3, 3]");
    want(mix.dim() == 4 && mix.size(1) == grouped.size(0) && mix.size(2) == 1 && mix.size(3) == 1,
         "mix", mix, "[any, half of expand's, 1, 1]");
    want(project.dim() == 4 && project.size(0) == mix.size(0) && project.size(2) == project.size(3),
         "project", project, "[mix's, bands, k, k]");
    batch = x.size(0), ins = x.size(1), height = x.size(2), width = x.size(3);
    up = expand.size(2), wide = expand.size(1), half = wide / 2;
    mixed = mix.size(0), down = project.size(2), bands = project.size(1);
    points = down * down * bands;
    lines = up * height, line = up * width;
    strip = std::clamp<int64_t>(kStripBytes / (up * line * wide * itemsize), 1,
                                std::max<int64_t>(height, 1));
  }
};

inline int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

// matrix [k, n] as products take it from the right: a zero row behind an odd number of rows, those of
// bfloat16 in pairs.
inline Tensor right_operand(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  Tensor operand = at::zeros({even(rows), columns}, matrix.options());
  operand.narrow(0, 0, rows).copy_(matrix);
  if (operand.scalar_type() != at::kBFloat16) return operand;
  return operand.view({even(rows) / 2, 2, columns}).transpose(1, 2).contiguous();
}

// A transposed convolution's weight [ins, outs, k, k] by tap: [k k outs, ins]. Some rows at a time are
// copied apart first, as their distance in memory, a power of two, would put all of them into one place
// of the cache.
template <typename T>
Tensor by_tap(const Tensor& weight) {
  constexpr int64_t kRows = 16;
  const int64_t ins = weight.size(0), outs = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t length = outs * taps, apart = length + kRows;
  const Tensor given = weight.contiguous();
  const Tensor turned = at::empty({taps * outs, ins}, given.options());
  const T* from = given.const_data_ptr<T>();
  T* to = data<T>(turned);
  at::parallel_for(0, (ins + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> rows(kRows * apart);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows, count = std::min(kRows, ins - first);
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(from + (first + i) * length, length, rows.data() + i * apart);
      }
      for (int64_t out = 0; out < outs; ++out) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          T* column = to + (tap * outs + out) * ins + first;
          for (int64_t i = 0; i < count; ++i) column[i] = rows[i * apart + out * taps + tap];
        }
      }
    }
  });
  return turned;
}

// Weights as products take them.
struct Weights {
  Tensor expand, expand_bias;                    // [up up wide, ins], by tap
  Tensor taps, taps_bias;                        // [9, 2, half] in the type of sums
  Tensor mix, mix_back, mix_bias;                // operands [half, mixed], [mixed, half]
  Tensor project, project_back, project_bias;    // operands [mixed, down down bands], by tap, and back

  Weights(const Sizes& s, at::ScalarType type, at::TensorList given) {
    const auto sums = sum_type(type);
    Tensor projecting;
    SPECTRALX_DISPATCH(type, [&] {
      expand = by_tap<S>(given[0].to(type)), projecting = by_tap<S>(given[6].to(type));
    });
    expand_bias = given[1].to(type).repeat({s.up * s.up});
    taps = taps_of(given[2], sums);
    taps_bias = given[3].to(sums).contiguous();
    const Tensor mixing = given[4].to(type).reshape({s.mixed, s.half});
    mix = right_operand(mixing.t()), mix_back = right_operand(mixing);
    mix_bias = given[5].to(sums).contiguous();
    project = right_operand(projecting.t()), project_back = right_operand(projecting);
    project_bias = given[7].to(sums).repeat({s.down * s.down});
  }
};

// Of a thread that makes a line. Rows have an even number of values, as products take them.
template <typename S, typename A>
struct Scratch {
  std::vector<A> sums, taps;
  std::vector<S> half, mixed, slope;

  explicit Scratch(const Sizes& s)
      : sums(s.line * std::max({s.mixed, s.points, s.half})), taps(s.wide),
        half(s.line * even(s.half)), mixed(s.line * even(s.mixed)), slope(s.line * s.mixed) {}
};

// Rows of a strip's pixels that have a gradient, in order.
struct Rows {
  std::vector<std::vector<int64_t>> pixels;  // of each line
  std::vector<int64_t> first;                // row of each line, and their number
  Tensor half, half_slope, mixed, mixed_grad, out_grad;

  Rows(const Sizes& s, const at::TensorOptions& options) {
    const int64_t most = (s.strip * s.up + 1) * s.line;
    const auto rows = [&](int64_t width) { return at::zeros({most, width}, options); };
    half = rows(even(s.half)), half_slope = rows(s.half), mixed = rows(even(s.mixed));
    mixed_grad = rows(even(s.mixed)), out_grad = rows(even(s.points));
  }
  int64_t count() const { return first.back(); }
  // Those there are, without what fills them up to an even width.
  Tensor of(const Tensor& all, int64_t width) const {
    return all.narrow(0, 0, count()).narrow(1, 0, width);
  }
};

}  // namespace spectralx::cpu::strips
