// Maps that are taken through 3x3 and 2x2 convolutions strip by strip, so that what lies between them
// stays in a cache and needs no memory of the size of the batch.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

namespace spectralx {

// Rows [row, row + rows) of images [image, image + images); row and rows are even.
struct Strip {
  int64_t image, images, row, rows;
};

// The strips of maps [images, channels, height, width], each of one image and about `elements`, or
// one of everything where that is 0.
class Strips {
 public:
  Strips() = default;
  Strips(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t elements)
      : images_(images), height_(height) {
    if (images * height * width == 0) return;
    if (elements == 0) {
      strips_.push_back({0, images, 0, height});
      return;
    }
    const int64_t most = std::max<int64_t>(elements / (width * channels) / 2 * 2, 2);
    const int64_t count = (height + most - 1) / most, rows = (height / 2 + count - 1) / count * 2;
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t row = 0; row < height; row += rows) {
        strips_.push_back({image, 1, row, std::min(rows, height - row)});
      }
    }
  }

  auto begin() const { return strips_.begin(); }
  auto end() const { return strips_.end(); }
  bool empty() const { return strips_.empty(); }
  bool one() const { return strips_.size() == 1; }

  // Of a map of this height or half of it.
  at::Tensor rows_of(const at::Tensor& map, const Strip& strip) const {
    const int64_t shrinks = height_ / map.size(2);
    return map.narrow(0, strip.image, strip.images)
        .narrow(2, strip.row / shrinks, strip.rows / shrinks);
  }

  // These rows of `map`, which is made, channels-last, where it is undefined.
  void put(at::Tensor& map, const Strip& strip, const at::Tensor& rows) const {
    if (one()) {
      map = rows;
      return;
    }
    if (!map.defined()) {
      map = at::empty({images_, rows.size(1), height_ * rows.size(2) / strip.rows, rows.size(3)},
                      rows.options(), at::MemoryFormat::ChannelsLast);
    }
    rows_of(map, strip).copy_(rows);
  }

  // What `make` gives for the rows of a strip and, unless it is as high as the map, for one above and
  // one below: zeros outside the map. A 3x3 convolution of that pads it by `padding`.
  template <typename Make>
  at::Tensor window(const Strip& strip, const Make& make) const {
    if (!cut(strip)) return make(strip);
    const int64_t above = strip.row > 0, below = strip.row + strip.rows < height_;
    const at::Tensor found =
        make(Strip{strip.image, strip.images, strip.row - above, strip.rows + above + below});
    return above + below == 2 ? found : at::constant_pad_nd(found, {0, 0, 1 - above, 1 - below});
  }
  at::Tensor inside(const at::Tensor& window, const Strip& strip) const {
    return cut(strip) ? window.narrow(2, 1, strip.rows) : window;
  }
  std::array<int64_t, 2> padding(const Strip& strip) const { return {cut(strip) ? 0 : 1, 1}; }

 private:
  bool cut(const Strip& strip) const { return strip.rows < height_; }

  int64_t images_ = 0, height_ = 0;
  std::vector<Strip> strips_;
};

// Gradients of the input, the weight and the bias of a convolution of such rows.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight, int64_t stride,
    std::array<int64_t, 2> padding, std::array<bool, 3> mask) {
  return at::convolution_backward(grad, input, weight, at::IntArrayRef({weight.size(0)}),
                                  {stride, stride}, padding, {1, 1}, false, {0, 0}, 1, mask);
}

}  // namespace spectralx
