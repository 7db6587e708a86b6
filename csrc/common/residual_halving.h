// spectralx::residual_halving on any device: what is computed when, around the vendor's
// convolutions. Maths: spectralx_kernels/hypert/README.md. A device gives `StemMaps`, the passes
// over maps that lie between the convolutions. Every map here is channels-last.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ops/convolution_backward.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

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
  // out = gradient of x; `norm_gradients` as above, undefined where the table is. out may be grad.
  virtual void gradient(const Tensor& grad, const Tensor& x, const Tensor& table,
                        const Tensor& norm_gradients, bool gelu, double eps,
                        const Tensor& out) const = 0;
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

class ResidualHalving {
 public:
  ResidualHalving(const StemMaps& maps, const Tensor& x, const StemWeights& weights, double eps)
      : maps_(maps), x_(x), w_(weights), eps_(eps), folded_(folds(weights.lift)) {
    const Tensor& w = w_.weight;
    TORCH_CHECK_VALUE(x.dim() == 4 && x.size(2) % 2 == 0 && x.size(3) % 2 == 0, "x: got shape ",
                      x.sizes(), ", expected [batch, channels, even height, even width]");
    TORCH_CHECK_VALUE(w.dim() == 4 && w.size(0) == w.size(1), "weight: got shape ", w.sizes(),
                      ", expected [channels, channels, 3, 3]");
    TORCH_CHECK_VALUE(w_.norm.has_value() == w_.norm_bias.has_value() &&
                          w_.half_norm.has_value() == w_.half_norm_bias.has_value() &&
                          w_.lift.has_value() == w_.lift_bias.has_value(),
                      "lift, norm and half_norm: expected a weight and a bias of each, or neither");
  }

  // out, both tables and, if they are kept, both convolutions' results; else [0] in their place.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(bool keep) {
    Tensor skip;
    if (!folded_) skip = lifted();
    Tensor convolved = last(folded_ ? at::conv2d(images(), folded_weight(lift_matrix()), w_.bias, 1, 1)
                                    : at::conv2d(skip, w_.weight, w_.bias, 1, 1));
    const Tensor table = table_of(convolved, w_.norm, w_.norm_bias);
    Tensor sum = summed(convolved, table, skip, !keep);
    skip = images_ = Tensor();
    Tensor halved = last(at::conv2d(sum, w_.half, w_.half_bias, 2));
    sum = Tensor();
    if (!keep) convolved = kept(convolved, false);
    const Tensor half_table = table_of(halved, w_.half_norm, w_.half_norm_bias);
    Tensor out = halved;
    if (half_table.defined()) {
      if (keep) out = at::empty_like(halved, kLast);
      maps_.apply(halved, half_table, {}, out);
    }
    return {out, shown(table), shown(half_table), convolved,
            kept(halved, keep && half_table.defined())};
  }

  // Gradients by the order of the schema, undefined where not wanted. `saved`: the outputs of
  // `forward` but the first.
  std::array<Tensor, 11> backward(const Tensor& grad, at::TensorList saved,
                                  const std::array<bool, 11>& wanted) {
    std::array<Tensor, 11> found;
    const Tensor table = w_.norm.has_value() ? saved[0] : Tensor();
    const Tensor half_table = w_.half_norm.has_value() ? saved[1] : Tensor();
    const Tensor& convolved = saved[2];
    TORCH_CHECK_VALUE(convolved.dim() == 4, "keep: got False in a call that is differentiated");

    Tensor halved_grad = last(grad);
    if (half_table.defined()) {
      const Tensor both = maps_.norm_gradients(halved_grad, saved[3], half_table, false, eps_);
      norm_grads(both, w_.half_norm, wanted, 9, found);
      const Tensor to = at::empty_like(halved_grad, kLast);
      maps_.gradient(halved_grad, saved[3], half_table, both, false, eps_, to);
      halved_grad = to;
    }
    const bool inside = std::any_of(wanted.begin(), wanted.begin() + 7, [](bool w) { return w; });
    Tensor sum_grad = half_backward(halved_grad, convolved, table, wanted, inside, found);
    halved_grad = Tensor();
    if (!inside) return found;

    Tensor both;
    if (table.defined()) {
      both = maps_.norm_gradients(sum_grad, convolved, table, true, eps_);
      norm_grads(both, w_.norm, wanted, 5, found);
    }
    // What reaches the 3x3 convolution; over `to`.
    const auto convolved_grad = [&](const Tensor& to) {
      maps_.gradient(sum_grad, convolved, table, both, true, eps_, to);
      return to;
    };
    if (folded_) {
      folded_backward(convolved_grad, sum_grad, wanted, found);
    } else {
      plain_backward(convolved_grad, sum_grad, wanted, found);
    }
    if (table.defined() && wanted[4]) found[4] = at::zeros_like(w_.bias);
    return found;
  }

 private:
  static Tensor last(const Tensor& map) { return map.contiguous(kLast); }

  static Tensor kept(const Tensor& map, bool keep) {
    return keep ? map : at::empty({0}, map.options().memory_format(std::nullopt));
  }

  Tensor shown(const Tensor& table) const {
    if (table.defined()) return table;
    return at::empty({4, 0}, x_.options().dtype(wide()));
  }

  at::ScalarType wide() const { return x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

  Tensor table_of(const Tensor& map, const OptionalTensor& weight, const OptionalTensor& bias) const {
    return weight.has_value() ? maps_.table(map, *weight, *bias, eps_) : Tensor();
  }

  int64_t channels() const { return maps_.padded(x_.size(1) + 1); }  // of images()

  // [M, channels]: the 1x1 convolution with its bias as the weight of a channel of ones.
  Tensor lift_matrix() const {
    const int64_t outs = w_.lift->size(0);
    return at::cat({w_.lift->flatten(1), w_.lift_bias->unsqueeze(1),
                    at::zeros({outs, channels() - x_.size(1) - 1}, w_.lift->options())},
                   1);
  }

  // [M, channels, 3, 3], the 3x3 convolution of what the 1x1 one gives. A channel of ones is zero in
  // the padding, as the lifted map is.
  Tensor folded_weight(const Tensor& lift) const {
    const int64_t outs = w_.weight.size(0), middle = w_.weight.size(1);
    const Tensor taps = w_.weight.permute({0, 2, 3, 1}).reshape({outs * 9, middle});
    return at::mm(taps, lift).view({outs, 3, 3, -1}).permute({0, 3, 1, 2});
  }

  const Tensor& images() {  // with their channel of ones
    if (!images_.defined()) images_ = maps_.with_ones(x_, channels());
    return images_;
  }

  // What the 3x3 convolution is given where the 1x1 one is not folded into it.
  Tensor lifted() const {
    if (!w_.lift.has_value()) return last(x_);
    // As a product of pixels, which takes images in planes as they are.
    const Tensor rows = x_.flatten(2).transpose(1, 2);  // [B, H W, C]
    const Tensor matrix = w_.lift->flatten(1).t().expand({x_.size(0), -1, -1});
    return at::baddbmm(*w_.lift_bias, rows, matrix)
        .view({x_.size(0), x_.size(2), x_.size(3), w_.lift->size(0)})
        .permute({0, 3, 1, 2});
  }

  // The residual sum, which the halving convolution is given; `own`: over x.
  Tensor summed(const Tensor& convolved, const Tensor& table, const Tensor& skip, bool own) {
    if (folded_) return maps_.lifted_sum(convolved, table, images(), lift_matrix(), own);
    // A lifted map is ours to write over.
    const Tensor sum = w_.lift.has_value() ? skip : own ? convolved : at::empty_like(convolved, kLast);
    maps_.apply(convolved, table, skip, sum);
    return sum;
  }

  static void norm_grads(const Tensor& both, const OptionalTensor& like,
                         const std::array<bool, 11>& wanted, int first,
                         std::array<Tensor, 11>& found) {
    for (int i = 0; i < 2; ++i) {
      // A copy: two outputs of an operator may not share their memory.
      if (wanted[first + i])
        found[first + i] = both[1 - i].to(like->scalar_type(), false, true);
    }
  }

  static std::tuple<Tensor, Tensor, Tensor> convolution_backward(
      const Tensor& grad, const Tensor& input, const Tensor& weight, int64_t stride,
      int64_t padding, std::array<bool, 3> mask) {
    return at::convolution_backward(grad, input, weight, at::IntArrayRef({weight.size(0)}),
                                    {stride, stride}, {padding, padding}, {1, 1}, false, {0, 0}, 1,
                                    mask);
  }

  // Of the halving convolution; the sum it was given is formed again where its weight wants it.
  Tensor half_backward(const Tensor& grad, const Tensor& convolved, const Tensor& table,
                       const std::array<bool, 11>& wanted, bool inside,
                       std::array<Tensor, 11>& found) {
    const bool bias = wanted[8] && !w_.half_norm.has_value();
    if (wanted[7] || bias) {
      Tensor sum = convolved;  // of the same shape
      if (wanted[7]) sum = summed(convolved, table, folded_ ? Tensor() : lifted(), false);
      std::tie(std::ignore, found[7], found[8]) =
          convolution_backward(grad, sum, w_.half, 2, 0, {false, wanted[7], bias});
    }
    // A batch norm of the batch's statistics takes any bias out again.
    if (wanted[8] && !bias) found[8] = at::zeros_like(w_.half_bias);
    if (!inside) return {};
    // By itself: the sum is gone by now.
    return last(std::get<0>(
        convolution_backward(grad, convolved, w_.half, 2, 0, {true, false, false})));
  }

  template <typename Gradient>
  void plain_backward(const Gradient& convolved_grad, Tensor& sum_grad,
                      const std::array<bool, 11>& wanted, std::array<Tensor, 11>& found) {
    const bool before = wanted[0] || wanted[1] || wanted[2];
    const bool bias = wanted[4] && !w_.norm.has_value();
    if (!before && !wanted[3] && !bias) return;
    Tensor grad = convolved_grad(before ? at::empty_like(sum_grad, kLast) : sum_grad);
    if (wanted[3] || bias) {
      std::tie(std::ignore, found[3], found[4]) = convolution_backward(
          grad, wanted[3] ? lifted() : grad, w_.weight, 1, 1, {false, wanted[3], bias});
    }
    if (!before) return;
    // By itself: the lifted map is gone by now.
    Tensor skip_grad = last(std::get<0>(
        convolution_backward(grad, grad, w_.weight, 1, 1, {true, false, false})));
    grad = Tensor();
    skip_grad.add_(sum_grad);
    sum_grad = Tensor();
    if (!w_.lift.has_value()) {
      found[0] = skip_grad;
      return;
    }
    const Tensor rows = skip_grad.permute({0, 2, 3, 1}).flatten(1, 2);  // [B, H W, M]
    const Tensor matrix = w_.lift->flatten(1);
    if (wanted[1]) {  // a product an image, as lie images in planes
      found[1] = at::bmm(rows.transpose(1, 2), x_.flatten(2).transpose(1, 2))
                     .sum(0, false, wide())
                     .to(x_.scalar_type())
                     .view_as(*w_.lift);
    }
    if (wanted[2]) found[2] = rows.sum({0, 1}, false, wide()).to(x_.scalar_type());
    if (wanted[0]) {
      found[0] = at::bmm(matrix.t().expand({x_.size(0), -1, -1}), rows.transpose(1, 2))
                     .view(x_.sizes());
    }
  }

  template <typename Gradient>
  void folded_backward(const Gradient& convolved_grad, Tensor& sum_grad,
                       const std::array<bool, 11>& wanted, std::array<Tensor, 11>& found) {
    const bool weights = wanted[1] || wanted[2] || wanted[3];
    const bool bias = wanted[4] && !w_.norm.has_value();
    const Tensor lift = lift_matrix(), folded = folded_weight(lift);
    const int64_t bands = x_.size(1), outs = w_.weight.size(0), middle = lift.size(0);
    if (!wanted[0] && !weights && !bias) return;
    Tensor image_grad, folded_grad, skip_image_grad, lift_grad;
    if (wanted[0] || wanted[1] || wanted[2]) {
      std::tie(skip_image_grad, lift_grad, std::ignore) =
          convolution_backward(sum_grad, images(), lift.unsqueeze(2).unsqueeze(3), 1, 0,
                               {wanted[0], wanted[1] || wanted[2], false});
    }
    std::tie(image_grad, folded_grad, found[4]) = convolution_backward(
        convolved_grad(sum_grad), images(), folded, 1, 1, {wanted[0], weights, bias});
    images_ = sum_grad = Tensor();
    if (wanted[0]) found[0] = image_grad.add_(skip_image_grad).narrow(1, 0, bands);
    if (!weights) return;
    // [outs * 9, channels]
    const Tensor taps_grad = folded_grad.permute({0, 2, 3, 1}).reshape({outs * 9, channels()});
    if (wanted[3]) {
      found[3] = at::mm(taps_grad, lift.t()).view({outs, 3, 3, middle}).permute({0, 3, 1, 2});
    }
    if (!wanted[1] && !wanted[2]) return;
    const Tensor taps = w_.weight.permute({0, 2, 3, 1}).reshape({outs * 9, middle});
    lift_grad = lift_grad.flatten(1) + at::mm(taps.t(), taps_grad);
    if (wanted[1]) found[1] = lift_grad.narrow(1, 0, bands).view_as(*w_.lift);
    if (wanted[2]) found[2] = lift_grad.select(1, bands);
  }

  const StemMaps& maps_;
  const Tensor& x_;
  const StemWeights& w_;
  double eps_;
  bool folded_;
  Tensor images_;
};

// `grad` laid out as `torch.empty_like` of the input is; itself where it is that already.
inline Tensor laid_out_as(const Tensor& grad, const Tensor& input) {
  const Tensor to = at::empty_like(input, input.options().device(at::kMeta));
  if (grad.strides() == to.strides() && grad.scalar_type() == input.scalar_type()) return grad;
  return at::empty_like(input).copy_(grad);
}

// What `residual_halving_backward` returns: the gradients that `output_mask` names, of zeros where
// there is no gradient of the output. `inputs`: the operator's, in the order of its schema, whose
// types and layouts the gradients get; `x`, `weights`, `grad` and `saved` in what it is computed in.
inline std::vector<Tensor> residual_halving_gradients(
    const StemMaps& maps, const Tensor& x, const StemWeights& weights, double eps,
    const OptionalTensor& grad, at::TensorList saved, const std::array<OptionalTensor, 11>& inputs,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_mask.size() == 13 && saved.size() == 4,
              "output_mask, saved: expected 13 and 4 entries");
  std::array<bool, 11> wanted{};
  for (int i = 0; i < 11; ++i) wanted[i] = output_mask[i];
  std::array<Tensor, 11> found;
  if (grad.has_value() && grad->defined()) {
    found = ResidualHalving(maps, x, weights, eps).backward(*grad, saved, wanted);
  }
  std::vector<Tensor> grads;
  for (int i = 0; i < 11; ++i) {
    if (!wanted[i]) continue;
    grads.push_back(found[i].defined() ? laid_out_as(found[i], *inputs[i])
                                       : at::zeros_like(*inputs[i]));
    found[i] = Tensor();
  }
  return grads;
}

}  // namespace spectralx
