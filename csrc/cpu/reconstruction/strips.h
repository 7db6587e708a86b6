// Strips of lines of a map: what of them is at hand, and grouped 3x3 convolutions of them.
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

}  // namespace spectralx::cpu::strips
