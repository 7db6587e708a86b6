// What pixel_head.cpp works on: lines at hand, sizes, and weights as its products take them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "cpu/common/product.h"
#include "cpu/reconstruction/channel_norm.h"

namespace spectralx::cpu::strips {

using at::Tensor;

constexpr int64_t kStripBytes = 1 << 22;  // of the widest lines of a strip, about

// Lines [first, last) of a map that are at hand.
template <typename S>
class Window {
 public:
  Window(int64_t lines, int64_t length, const at::TensorOptions& options)
      : length_(length), store_(at::empty({lines, length}, options)) {}

  S* at(int64_t line) const { return data<S>(store_) + (line - first_) * length_; }
  int64_t last() const { return last_; }
  void extend(int64_t last) {
    TORCH_INTERNAL_ASSERT(last - first_ <= store_.size(0));
    last_ = last;
  }
  // Lines before `first` are not needed any more.
  void drop(int64_t first) {
    first = std::clamp(first, first_, last_);
    std::memmove(at(first_), at(first), (last_ - first) * length_ * sizeof(S));
    first_ = first;
  }
  // [lines, length] from `line` on.
  Tensor rows(int64_t line, int64_t count) const { return store_.narrow(0, line - first_, count); }
  // The lines above, at and below; null beyond the map.
  std::array<const S*, 3> around(int64_t line, int64_t lines) const {
    return {line > 0 ? at(line - 1) : nullptr, at(line), line + 1 < lines ? at(line + 1) : nullptr};
  }

 private:
  int64_t length_, first_ = 0, last_ = 0;
  Tensor store_;
};

// run(line, scratch) over the lines [first, last) in parallel, with what `make` gives each thread.
template <typename Make, typename Run>
void for_lines(int64_t first, int64_t last, const Make& make, const Run& run) {
  at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
    auto scratch = make();
    for (int64_t line = begin; line < end; ++line) run(line, scratch);
    end_products();
  });
}

// The taps [9, 2, half] of a grouped convolution's weight [half, 2, 3, 3], and back.
inline Tensor taps_of(const Tensor& weight, at::ScalarType type) {
  return weight.to(type).permute({2, 3, 1, 0}).reshape({9, 2, weight.size(0)}).contiguous();
}
inline Tensor weight_of_taps(const Tensor& taps) {
  return taps.view({3, 3, 2, taps.size(2)}).permute({3, 2, 0, 1});
}

// sums [9, 2, half] += the gradients of the taps from lines [first, last) of `lines` that are `line`
// pixels long: `back` is the gradient behind the convolution.
template <typename S, typename A>
void add_tap_gradients(const Window<S>& back, const Window<S>& hidden, int64_t first, int64_t last,
                       int64_t lines, int64_t line, int64_t half, const Tensor& sums) {
  constexpr int64_t kChannels = 32;
  at::parallel_for(0, (half + kChannels - 1) / kChannels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = first; at < last; ++at) {
      head_kernels<S, A>().tap_gradients(back.at(at), hidden.around(at, lines).data(), line, half,
                                         begin * kChannels, std::min(end * kChannels, half),
                                         data<A>(sums));
    }
  });
}

// sums [channels] += the sum of rows [.., channels].
inline void add_rows(const Tensor& rows, const Tensor& sums) {
  sums.add_(rows.sum(0, false, sums.scalar_type()));
}

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

// Weights as products take them.
struct Weights {
  Tensor expand, expand_bias;                    // [up up wide, ins], by tap
  Tensor taps, taps_bias;                        // [9, 2, half] in the type of sums
  Tensor mix, mix_back, mix_bias;                // operands [half, mixed], [mixed, half]
  Tensor project, project_back, project_bias;    // operands [mixed, down down bands], by tap, and back

  Weights(const Sizes& s, at::ScalarType type, at::TensorList given) {
    const auto sums = sum_type(type);
    const auto by_tap = [&](const Tensor& weight) {
      return weight.to(type).permute({2, 3, 1, 0}).reshape({-1, weight.size(0)}).contiguous();
    };
    expand = by_tap(given[0]), expand_bias = given[1].to(type).repeat({s.up * s.up});
    taps = taps_of(given[2], sums);
    taps_bias = given[3].to(sums).contiguous();
    const Tensor mixing = given[4].to(type).reshape({s.mixed, s.half}), projecting = by_tap(given[6]);
    mix = right_operand(mixing.t()), mix_back = right_operand(mixing);
    mix_bias = given[5].to(sums).contiguous();
    project = right_operand(projecting.t()), project_back = right_operand(projecting);
    project_bias = given[7].to(sums).repeat({s.down * s.down});
  }
};

}  // namespace spectralx::cpu::strips
