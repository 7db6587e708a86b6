// A convolution of a normed map in float, a line of pixels at a time; see line_convolution.cpp.
#pragma once

#include <optional>
#include <vector>

#include "cpu/reconstruction/channel_norm.h"

namespace spectralx::cpu {

// Convolution(norm(x)). Maps are float and channels last; `weight` [out, in, kernel, kernel], or
// [in, out, kernel, kernel] of a transposed convolution.
class LineConvolution {
 public:
  // `weight` is float. stride: 1, but of a transposed convolution.
  LineConvolution(const at::Tensor& x, const at::Tensor& weight, bool transposed,
                  at::IntArrayRef stride, at::IntArrayRef padding);

  // Whether a convolution is of the kind, and its lines long enough and its weight small enough, that
  // this is faster than the vendor's of a whole normed map.
  static bool takes(const at::Tensor& x, const at::Tensor& weight, bool transposed,
                    at::IntArrayRef stride, at::IntArrayRef padding);

  at::Tensor forward(const at::Tensor& x, const ChannelNorm& norm,
                     const std::optional<at::Tensor>& bias) const;

  // x_grad is filled if defined; sums [2, in] in double, of the gradients of the norm's parameters,
  // are added to if defined. The gradient of the weight, undefined where not wanted.
  at::Tensor backward(const at::Tensor& grad, const at::Tensor& x, const ChannelNorm& norm,
                      const at::Tensor& x_grad, const at::Tensor& sums, bool wants_weight) const;

 private:
  // Along one direction: sizes, and for each remainder of a place out by the stride the taps that
  // meet it. Tap taps[t] of place stride * i + remainder lies on place in i + first + t.
  struct Axis {
    struct Phase {
      int64_t first;
      std::vector<int64_t> taps;

      int64_t last() const { return first + static_cast<int64_t>(taps.size()) - 1; }
    };
    int64_t in, out, kernel, stride;
    // Place in i lies under places out stride * i - reach + t, t < kernel, by taps in order, or in
    // reverse where not transposed.
    int64_t reach;
    std::vector<Phase> phases;

    // How many places out have this remainder by the stride.
    int64_t places(int64_t remainder) const {
      return remainder < out ? (out - remainder - 1) / stride + 1 : 0;
    }
    // How many strides from i on the place out lies that `tap` of place in i is under, rounded down.
    int64_t place(int64_t tap) const {
      const int64_t from = tap - reach;
      return from < 0 ? -((stride - 1 - from) / stride) : from / stride;
    }

    Axis(int64_t in, int64_t kernel, int64_t stride, int64_t padding, bool transposed);
    static int64_t size_out(int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                            bool transposed);
  };

  int64_t batch_, ins_, outs_;
  Axis down_, along_;
  bool transposed_;
  at::Tensor taps_;  // [kernel, kernel, in, out]
};

}  // namespace spectralx::cpu
