// The "taps" algorithm of spectralx::upsample_conv2d on the CPU: 1x1 products on the small map, summed
// over taps and positions.
//
// Everything lies in channels-last order. A task takes a chunk of output channels of some images:
// it packs its part of the weight to [ky * kx, chunk, C], takes the products Z on the small map by
// the library behind ATen, sums Z over the columns' taps into lines and the lines into output rows.
// Z and the lines of a task fit in the cache. Backward goes the same way round: each line gathers
// the output rows that took from it, in ascending order. Tasks depend on shapes alone, so results
// do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/upsample/interpolation.h"
#include "cpu/upsample/maps.h"

namespace spectralx::cpu {

constexpr int64_t kChunk = 64;  // channels of a task

struct Shape {
  int64_t batch, channels, height, width, outs, ky, kx, rows, columns;  // rows, columns: output's
  int64_t taps() const { return ky * kx; }
  int64_t chunks() const { return (outs + kChunk - 1) / kChunk; }
  int64_t chunk(int64_t i) const { return std::min(kChunk, outs - i * kChunk); }
};

// Where the taps of a convolution fall on a resized map.
struct Placement {
  at::IntArrayRef size, padding;
  bool align_corners;

  template <typename A>
  Axis<A> axis(const Shape& s, int64_t i) const {
    return Axis<A>(i == 0 ? s.height : s.width, size[i], i == 0 ? s.ky : s.kx, padding[i],
                   align_corners);
  }
};

inline std::vector<int64_t> tap_offsets(const at::Tensor& weight) {
  std::vector<int64_t> offsets;
  for (int64_t s = 0; s < weight.size(2); ++s) {
    for (int64_t t = 0; t < weight.size(3); ++t) {
      offsets.push_back(s * weight.stride(2) + t * weight.stride(3));
    }
  }
  return offsets;
}

// Sources and weights of one weighted sum.
template <typename S, typename A>
struct Sum {
  std::vector<const S*> sources;
  std::vector<A> weights;
  int64_t n = 0;

  explicit Sum(int64_t most) : sources(most), weights(most) {}
  void add(const S* source, A weight) {
    sources[n] = source;
    weights[n++] = weight;
  }
};

// What the pass that writes the output does beside; tensors undefined where there are none.
struct Epilogue {
  at::Tensor bias;     // [O], in the type of sums
  at::Tensor addend;   // as the output, channels last
  bool relu;
  at::Tensor moments;  // [B * H', 2, O] in the type of sums, to be filled: see merged_moments
};

// out [B, O, H', W'], channels last, of x [B * h * w, C]; all in one type.
void taps_forward(const Shape& s, const Placement& placement, const at::Tensor& x,
                  const at::Tensor& weight, const Epilogue& epilogue, const at::Tensor& out);

// Gradients of x [B * h * w, C] and of weight, each where defined; grad is channels last.
void taps_backward(const Shape& s, const Placement& placement, const at::Tensor& grad,
                   const at::Tensor& x, const at::Tensor& weight, const at::Tensor& dx,
                   const at::Tensor& dweight);

// Sums of grad over all pixels, [O].
at::Tensor channel_sums(const Shape& s, const at::Tensor& grad);

}  // namespace spectralx::cpu
