// What common/residual_halving.h is given: weights, and by a device the passes over maps between its
// convolutions.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

namespace spectralx {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

// The passes between convolutions. A table is [4, C] in the type sums are formed in: mean, variance,
// scale, shift, of z = (x - mean) scale + shift; undefined: z = x.
struct StemMaps {
  virtual ~StemMaps() = default;
  // The table of a batch norm with the statistics of x.
  virtual Tensor table(const Tensor& x, const Tensor& weight, const Tensor& bias,
                       double eps) const = 0;
  // out = z, or skip + GELU(z) where `skip` is defined; out may be x or skip.
  virtual void apply(const Tensor& x, const Tensor& table, const Tensor& skip,
                     const Tensor& out) const = 0;
  // [2, C] like the table: gradients of bias and weight of the batch norm, for `grad` of what
  // `apply` gave.
  virtual Tensor norm_gradients(const Tensor& grad, const Tensor& x, const Tensor& table, bool gelu,
                                double eps) const = 0;
  // out = gradient of x; `norm_gradients` as above, of `pixels` pixels, of which x may be some;
  // undefined where the table is. out may be grad.
  virtual void gradient(const Tensor& grad, const Tensor& x, const Tensor& table,
                        const Tensor& norm_gradients, int64_t pixels, bool gelu, double eps,
                        const Tensor& out) const = 0;
  // Elements of a map that are best taken through the convolutions at a time, as rows of one image;
  // 0: all of it at once. Forward, of maps that need not be whole.
  virtual int64_t strip() const { return 0; }
  virtual int64_t backward_strip() const { return 0; }
  // Images with one more channel, of ones, and zeros behind it up to `channels`.
  virtual Tensor with_ones(const Tensor& images, int64_t channels) const = 0;
  // Channels that a convolution of this many runs best with.
  virtual int64_t padded(int64_t channels) const { return channels; }
  // The 1x1 convolution `lift` [M, channels] of images, plus GELU(z); `own`: over x.
  virtual Tensor lifted_sum(const Tensor& x, const Tensor& table, const Tensor& images,
                            const Tensor& lift, bool /*own*/) const {
    const Tensor sum = product_of(images, lift);
    apply(x, table, sum, sum);
    return sum;
  }

 protected:
  // [B, M, H, W], channels-last: matrix [M, channels] times a channels-last map's channels.
  static Tensor product_of(const Tensor& map, const Tensor& matrix) {
    const int64_t images = map.size(0), height = map.size(2), width = map.size(3);
    const Tensor rows = map.permute({0, 2, 3, 1}).reshape({images * height * width, map.size(1)});
    return at::mm(rows, matrix.t())
        .view({images, height, width, matrix.size(0)})
        .permute({0, 3, 1, 2});
  }
};

struct StemWeights {
  const OptionalTensor &lift, &lift_bias;
  const Tensor &weight, &bias;
  const OptionalTensor &norm, &norm_bias;
  const Tensor &half, &half_bias;
  const OptionalTensor &half_norm, &half_norm_bias;
};

// Whether conv3x3(conv1x1(images)) runs as one 3x3 convolution of the bands and a channel of ones:
// where that takes at most three quarters of the multiplications.
inline bool folds(const OptionalTensor& lift) {
  return lift.has_value() && 4 * (lift->size(1) + 1) <= 3 * lift->size(0);
}

}  // namespace spectralx
