// spectralx::residual_halving on any device: what is computed when, around the vendor's
// convolutions, and in which strips. Maths: spectralx_kernels/hypert/README.md. A device gives
// `StemMaps`. Every map here is channels-last.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ops/convolution_backward.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "common/laid_out.h"
#include "common/stem_maps.h"
#include "common/strips.h"

namespace spectralx {

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
    if (!folded_) return;
    lift_ = lift_matrix();
    folded_weight_ = folded_weight();
  }

  // out, both tables and, if they are kept, both convolutions' results; else [0] in their place.
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(bool keep) {
    Tensor convolved, table, halved;
    const bool twice = keep || w_.norm.has_value();  // all is convolved before anything is normed
    cut(twice ? 0 : maps_.strip());
    if (strips_.empty()) convolved = blank(w_.weight, 1), halved = blank(w_.half, 2);
    if (twice) {
      hold_given();
      for (const Strip& strip : strips_) {
        strips_.put(convolved, strip, convolve(window(strip), strip));
      }
      table = table_of(convolved, w_.norm, w_.norm_bias);
    }
    for (const Strip& strip : strips_) {
      Tensor rows, skip;
      if (twice) {
        rows = strips_.rows_of(convolved, strip), skip = given(strip);
      } else {
        const Tensor around = window(strip);
        rows = convolve(around, strip), skip = strips_.inside(around, strip);
      }
      // A lifted map is ours to write over.
      const bool over_skip = keep && w_.lift.has_value() && !folded_;
      Tensor sum = summed(rows, table, skip, !keep ? rows : over_skip ? skip : Tensor());
      rows = skip = Tensor();
      if (strips_.one()) given_ = Tensor();
      strips_.put(halved, strip, last(at::conv2d(sum, w_.half, w_.half_bias, 2)));
    }
    given_ = Tensor();
    if (!keep) convolved = kept(x_, false);
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
    cut(maps_.backward_strip());
    std::array<Tensor, 11> found;
    const Tensor table = w_.norm.has_value() ? saved[0] : Tensor();
    const Tensor half_table = w_.half_norm.has_value() ? saved[1] : Tensor();
    const Tensor& convolved = saved[2];
    TORCH_CHECK_VALUE(convolved.dim() == 4, "keep: got False in a call that is differentiated");

    const int64_t pixels = x_.size(0) * x_.size(2) * x_.size(3);
    Tensor halved_grad = last(grad);
    if (half_table.defined()) {
      const Tensor both = maps_.norm_gradients(halved_grad, saved[3], half_table, false, eps_);
      norm_grads(both, w_.half_norm, wanted, 9, found);
      const Tensor to = at::empty_like(halved_grad, kLast);
      maps_.gradient(halved_grad, saved[3], half_table, both, pixels / 4, false, eps_, to);
      halved_grad = to;
    }
    const bool inner = std::any_of(wanted.begin(), wanted.begin() + 7, [](bool w) { return w; });
    // Strips are made again for each use, which costs less than the memory of the whole.
    const bool given = wanted[3] || wanted[7] || (folded_ && (wanted[1] || wanted[2]));
    if (given && strips_.one()) hold_given();
    Tensor sum_grad = half_backward(halved_grad, convolved, table, wanted, inner, found);
    halved_grad = Tensor();
    if (!inner || strips_.empty()) return found;

    Tensor both;
    if (table.defined()) {
      both = maps_.norm_gradients(sum_grad, convolved, table, true, eps_);
      norm_grads(both, w_.norm, wanted, 5, found);
    }
    // What reaches the 3x3 convolution in rows of a strip; `own`: over the gradient of the sum.
    const auto convolved_grad = [&](const Strip& strip, bool own) {
      const Tensor from = strips_.rows_of(sum_grad, strip);
      const Tensor to = own ? from : at::empty_like(from, kLast);
      maps_.gradient(from, strips_.rows_of(convolved, strip), table, both, pixels, true, eps_, to);
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
  void cut(int64_t elements) {
    strips_ = Strips(x_.size(0), w_.weight.size(0), x_.size(2), x_.size(3), elements);
  }

  // What the 3x3 convolution is given for a strip, one row beyond it on either side.
  Tensor window(const Strip& strip) const {
    return strips_.window(strip, [&](const Strip& rows) { return given(rows); });
  }
  Tensor convolve(const Tensor& window, const Strip& strip) const {
    const Tensor& weight = folded_ ? folded_weight_ : w_.weight;
    return last(at::conv2d(window, weight, w_.bias, 1, strips_.padding(strip)));
  }

  // The gradient of a 3x3 convolution's input, from that of its result in a window.
  Tensor convolve_back(const Tensor& window, const Tensor& turned, const Strip& strip) const {
    return last(at::conv2d(window, turned, {}, 1, strips_.padding(strip)));
  }
  static Tensor turned(const Tensor& weight) { return weight.flip({2, 3}).transpose(0, 1); }

  // A map of no images or pixels.
  Tensor blank(const Tensor& weight, int64_t stride) const {
    return at::empty({x_.size(0), weight.size(0), x_.size(2) / stride, x_.size(3) / stride},
                     x_.options(), kLast);
  }

  static Tensor last(const Tensor& map) { return map.contiguous(kLast); }

  static Tensor kept(const Tensor& map, bool keep) {
    return keep ? map : at::empty({0}, map.options().memory_format(std::nullopt));
  }

  Tensor shown(const Tensor& table) const {
    if (table.defined()) return table;
    return at::empty({4, 0}, x_.options().dtype(wide()));
  }

  at::ScalarType wide() const { return x_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

  // Sums over strips, in their order, in the type sums are formed in if there are several.
  void add(Tensor& total, const Tensor& part) const {
    total = total.defined() ? total.to(wide()).add_(part) : part;
  }

  Tensor table_of(const Tensor& map, const OptionalTensor& weight, const OptionalTensor& bias) const {
    return weight.has_value() ? maps_.table(map, *weight, *bias, eps_) : Tensor();
  }

  int64_t channels() const { return maps_.padded(x_.size(1) + 1); }  // of images with ones

  // [M, channels]: the 1x1 convolution with its bias as the weight of a channel of ones.
  Tensor lift_matrix() const {
    const int64_t outs = w_.lift->size(0);
    return at::cat({w_.lift->flatten(1), w_.lift_bias->unsqueeze(1),
                    at::zeros({outs, channels() - x_.size(1) - 1}, w_.lift->options())},
                   1);
  }

  // [M, channels, 3, 3], the 3x3 convolution of what the 1x1 one gives. A channel of ones is zero in
  // the padding, as the lifted map is.
  Tensor folded_weight() const {
    const int64_t outs = w_.weight.size(0), middle = w_.weight.size(1);
    const Tensor taps = w_.weight.permute({0, 2, 3, 1}).reshape({outs * 9, middle});
    return at::mm(taps, lift_).view({outs, 3, 3, -1}).permute({0, 3, 1, 2});
  }

  // What the 3x3 convolution is given in rows of a strip.
  Tensor given(const Strip& strip) const {
    if (given_.defined()) return strips_.rows_of(given_, strip);
    return made(strips_.rows_of(x_, strip));
  }
  Tensor made(const Tensor& x) const {
    if (!w_.lift.has_value()) return last(x);
    if (folded_) return maps_.with_ones(x, channels());
    // As a product of pixels, which takes images in planes as they are.
    const Tensor rows = x.flatten(2).transpose(1, 2);  // [B, H W, C]
    const Tensor matrix = w_.lift->flatten(1).t().expand({x.size(0), -1, -1});
    return at::baddbmm(*w_.lift_bias, rows, matrix)
        .view({x.size(0), x.size(2), x.size(3), w_.lift->size(0)})
        .permute({0, 3, 1, 2});
  }
  // Keeps it for all strips at once, where it is wanted more than once.
  void hold_given() {
    if (!strips_.empty()) given_ = made(x_);
  }

  // The residual sum, which the halving convolution is given; over `over`, x or skip, if defined.
  Tensor summed(const Tensor& x, const Tensor& table, const Tensor& skip, const Tensor& over) const {
    if (folded_) return maps_.lifted_sum(x, table, skip, lift_, over.defined());
    const Tensor sum = over.defined() ? over : at::empty_like(x, kLast);
    maps_.apply(x, table, skip, sum);
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

  // Of the halving convolution; the sum it was given is formed again where its weight wants it. The
  // gradient of that sum, if `inner`.
  Tensor half_backward(const Tensor& grad, const Tensor& convolved, const Tensor& table,
                       const std::array<bool, 11>& wanted, bool inner,
                       std::array<Tensor, 11>& found) {
    const bool bias = wanted[8] && !w_.half_norm.has_value();
    Tensor sum_grad;
    for (const Strip& strip : strips_) {
      const Tensor rows = strips_.rows_of(convolved, strip);
      const Tensor upstream = strips_.rows_of(grad, strip);
      if (wanted[7] || bias) {
        const Tensor sum = wanted[7] ? summed(rows, table, given(strip), {}) : rows;
        const auto [none, weight_grad, bias_grad] =
            convolution_backward(upstream, sum, w_.half, 2, {0, 0}, {false, wanted[7], bias});
        if (wanted[7]) add(found[7], weight_grad);
        if (bias) add(found[8], bias_grad);
      }
      // By itself: the sum is gone by now.
      if (inner) {
        const Tensor input_grad = std::get<0>(
            convolution_backward(upstream, rows, w_.half, 2, {0, 0}, {true, false, false}));
        strips_.put(sum_grad, strip, last(input_grad));
      }
    }
    // A batch norm of the batch's statistics takes any bias out again.
    if (wanted[8] && !bias) found[8] = at::zeros_like(w_.half_bias);
    return sum_grad;
  }

  template <typename Gradient>
  void plain_backward(const Gradient& convolved_grad, Tensor& sum_grad,
                      const std::array<bool, 11>& wanted, std::array<Tensor, 11>& found) {
    const bool before = wanted[0] || wanted[1] || wanted[2];
    const bool bias = wanted[4] && !w_.norm.has_value();
    if (!before && !wanted[3] && !bias) return;
    const Tensor back = before ? turned(w_.weight) : Tensor();
    for (const Strip& strip : strips_) {
      Tensor grad = strips_.window(strip, [&](const Strip& rows) {
        return convolved_grad(rows, strips_.one() && !before);
      });
      if (wanted[3] || bias) {
        const auto [none, weight_grad, bias_grad] = convolution_backward(
            strips_.inside(grad, strip), wanted[3] ? window(strip) : grad, w_.weight, 1,
            strips_.padding(strip), {false, wanted[3], bias});
        if (wanted[3]) add(found[3], weight_grad);
        if (bias) add(found[4], bias_grad);
      }
      if (!before) continue;
      if (strips_.one()) given_ = Tensor();
      const Tensor skip_grad = convolve_back(grad, back, strip);
      grad = Tensor();
      skip_grad.add_(strips_.rows_of(sum_grad, strip));
      if (w_.lift.has_value()) {
        lift_backward(skip_grad, strip, wanted, found);
      } else {
        strips_.put(found[0], strip, skip_grad);
      }
    }
  }

  // Of the 1x1 convolution, where it is not folded, from the gradient of its result.
  void lift_backward(const Tensor& grad, const Strip& strip, const std::array<bool, 11>& wanted,
                     std::array<Tensor, 11>& found) const {
    const Tensor rows = grad.permute({0, 2, 3, 1}).flatten(1, 2);  // [B, H W, M]
    const Tensor x = strips_.rows_of(x_, strip), matrix = w_.lift->flatten(1);
    if (wanted[1]) {  // a product an image, as lie images in planes
      add(found[1], at::bmm(rows.transpose(1, 2), x.flatten(2).transpose(1, 2))
                        .sum(0, false, wide())
                        .view_as(*w_.lift));
    }
    if (wanted[2]) add(found[2], rows.sum(at::IntArrayRef{0, 1}, false, wide()));
    if (wanted[0]) {
      const Tensor across = matrix.t().expand({x.size(0), -1, -1});
      strips_.put(found[0], strip, at::bmm(across, rows.transpose(1, 2)).view(x.sizes()));
    }
  }

  template <typename Gradient>
  void folded_backward(const Gradient& convolved_grad, Tensor& sum_grad,
                       const std::array<bool, 11>& wanted, std::array<Tensor, 11>& found) {
    const bool weights = wanted[1] || wanted[2] || wanted[3];
    const bool bias = wanted[4] && !w_.norm.has_value();
    if (!wanted[0] && !weights && !bias) return;
    const Tensor lift = lift_.unsqueeze(2).unsqueeze(3);  // [M, channels, 1, 1]
    const Tensor back = wanted[0] ? turned(folded_weight_) : Tensor();
    Tensor folded_grad, lift_grad;
    for (const Strip& strip : strips_) {
      const Tensor images = window(strip), upstream = strips_.rows_of(sum_grad, strip);
      Tensor image_grad;
      if (wanted[0] || wanted[1] || wanted[2]) {
        Tensor weight_grad;
        std::tie(image_grad, weight_grad, std::ignore) =
            convolution_backward(upstream, strips_.inside(images, strip), lift, 1, {0, 0},
                                 {wanted[0], wanted[1] || wanted[2], false});
        if (weight_grad.defined()) add(lift_grad, weight_grad);
      }
      const Tensor grad = strips_.window(
          strip, [&](const Strip& rows) { return convolved_grad(rows, strips_.one()); });
      if (weights || bias) {
        const auto [none, weight_grad, bias_grad] =
            convolution_backward(strips_.inside(grad, strip), images, folded_weight_, 1,
                                 strips_.padding(strip), {false, weights, bias});
        if (weights) add(folded_grad, weight_grad);
        if (bias) add(found[4], bias_grad);
      }
      if (wanted[0]) {
        image_grad.add_(convolve_back(grad, back, strip));
        strips_.put(found[0], strip, image_grad.narrow(1, 0, x_.size(1)));
      }
    }
    given_ = sum_grad = Tensor();
    if (weights) unfold(folded_grad, lift_grad, wanted, found);
  }

  // From the gradients of the folded 3x3 convolution and of the 1x1 one beside it.
  void unfold(const Tensor& folded_grad, const Tensor& lift_grad, const std::array<bool, 11>& wanted,
              std::array<Tensor, 11>& found) const {
    const int64_t bands = x_.size(1), outs = w_.weight.size(0), middle = lift_.size(0);
    const auto type = x_.scalar_type();
    // [outs * 9, channels]
    const Tensor taps_grad =
        folded_grad.permute({0, 2, 3, 1}).reshape({outs * 9, channels()}).to(type);
    if (wanted[3]) {
      found[3] = at::mm(taps_grad, lift_.t()).view({outs, 3, 3, middle}).permute({0, 3, 1, 2});
    }
    if (!wanted[1] && !wanted[2]) return;
    const Tensor taps = w_.weight.permute({0, 2, 3, 1}).reshape({outs * 9, middle});
    const Tensor both = lift_grad.flatten(1) + at::mm(taps.t(), taps_grad);
    if (wanted[1]) found[1] = both.narrow(1, 0, bands).view_as(*w_.lift);
    if (wanted[2]) found[2] = both.select(1, bands);
  }

  const StemMaps& maps_;
  const Tensor& x_;
  const StemWeights& w_;
  double eps_;
  bool folded_;
  Strips strips_;
  Tensor lift_, folded_weight_;  // where the 1x1 convolution is folded
  Tensor given_;                 // what the 3x3 convolution is given, where it is held whole
};

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
    grads.push_back(found[i].defined() ? laid_out(found[i], *inputs[i])
                                       : at::zeros_like(*inputs[i]));
    found[i] = Tensor();
  }
  return grads;
}

}  // namespace spectralx
