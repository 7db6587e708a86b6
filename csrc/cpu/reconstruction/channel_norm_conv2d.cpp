// spectralx::channel_norm_conv2d on the CPU. Maths: spectralx_kernels/reconstruction/README.md.
//
// The map that is convolved is kept nowhere. Before a convolution that leaves the sides as they are it
// exists a strip of lines at a time, in the cache and in the same memory again and again: fresh memory
// for whole maps costs as much as the norm. Before others it exists for one image at a time. Strips
// depend on shapes alone and their sums are added in order.
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <vector>

#include "cpu/reconstruction/channel_norm.h"

namespace spectralx::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kStripBytes = 1 << 21;  // of the normed lines of a strip, about

struct Convolution {
  Tensor weight;
  OptionalTensor bias;
  bool transposed;
  at::IntArrayRef stride, padding;

  Tensor forward(const Tensor& x, at::IntArrayRef pad) const {
    return at::convolution(x, weight, bias, stride, pad, {1, 1}, transposed, {0, 0}, 1)
        .contiguous(kChannelsLast);
  }
  Tensor input_gradient(const Tensor& grad, const Tensor& x, at::IntArrayRef pad) const {
    return std::get<0>(backward(grad, x, pad, {true, false, false})).contiguous(kChannelsLast);
  }
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x,
                                              at::IntArrayRef pad,
                                              std::array<bool, 3> wanted) const {
    return at::convolution_backward(grad, x, weight, at::IntArrayRef({grad.size(1)}), stride, pad,
                                    {1, 1}, transposed, {0, 0}, 1, wanted);
  }
  // Lines of a strip of x; 0 where it runs an image at a time.
  int64_t strip(const Tensor& x) const {
    const int64_t kernel = weight.size(2);
    const bool same = !transposed && stride == at::IntArrayRef({1, 1}) && kernel % 2 == 1 &&
                      padding[0] == kernel / 2 && weight.size(3) == 2 * padding[1] + 1;
    const int64_t lines = kStripBytes / (x.size(1) * x.size(3) * x.itemsize());
    return same && lines >= 2 * kernel && lines < x.size(2) ? lines : 0;
  }
};

Convolution convolution_of(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                           bool transposed, at::IntArrayRef stride, at::IntArrayRef padding) {
  const int64_t ins = transposed ? 0 : 1;
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(ins) == x.size(1), "weight: got shape ",
                    weight.sizes(), ", expected ", x.size(1), " channels in");
  TORCH_CHECK_VALUE(!bias.has_value() || bias->numel() == weight.size(1 - ins), "bias: got ",
                    bias->numel(), " values, expected ", weight.size(1 - ins));
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2,
                    "stride, padding: expected two integers each");
  const auto type = map_type(x.scalar_type());
  return {weight.to(type), bias.has_value() ? OptionalTensor(bias->to(type)) : std::nullopt,
          transposed, stride, padding};
}

// Lines [first - margin, first + lines + margin) of an image, zeros beyond it; `to` holds them.
// write(from, to) makes the lines of the map from those of the image.
template <typename Write>
Tensor padded(const Tensor& image, int64_t first, int64_t lines, int64_t margin, const Tensor& to,
              const Write& write) {
  const int64_t begin = std::max<int64_t>(first - margin, 0);
  const int64_t end = std::min(first + lines + margin, image.size(2));
  const int64_t before = begin - (first - margin), after = first + lines + margin - end;
  const Tensor held = to.narrow(2, 0, lines + 2 * margin);
  if (before > 0) held.narrow(2, 0, before).zero_();
  if (after > 0) held.narrow(2, before + end - begin, after).zero_();
  write(image.narrow(2, begin, end - begin), held.narrow(2, before, end - begin));
  return held;
}

// use(first line, lines) of all strips, in order.
template <typename Use>
void for_strips(int64_t height, int64_t strip, const Use& use) {
  for (int64_t first = 0; first < height; first += strip) {
    use(first, std::min(strip, height - first));
  }
}

// Memory for the lines of a strip and those around it.
Tensor strip_memory(const Tensor& image, int64_t channels, int64_t lines) {
  return at::empty({1, channels, lines, image.size(3)}, image.options(), kChannelsLast);
}

Tensor channel_norm_conv2d(const Tensor& x, const OptionalTensor& norm_weight,
                           const OptionalTensor& norm_bias, double eps, std::string_view before,
                           std::string_view after, const Tensor& weight, const OptionalTensor& bias,
                           bool transposed, at::IntArrayRef stride, at::IntArrayRef padding) {
  const ChannelNorm norm(norm_weight, norm_bias, eps, before, after, x);
  const Convolution convolution = convolution_of(x, weight, bias, transposed, stride, padding);
  const Tensor map = as_map(x);
  const auto apply = [&](const Tensor& from, const Tensor& to) {
    norm.apply(from, std::nullopt, 1, to);
  };
  const int64_t strip = convolution.strip(map), margin = padding[0], batch = x.size(0);
  if (batch == 0) return convolution.forward(map, padding).to(x.scalar_type());
  Tensor out, held;
  for (int64_t index = 0; index < batch; ++index) {
    const Tensor image = map.narrow(0, index, 1);
    if (strip == 0) {
      if (!held.defined()) held = like(image);
      apply(image, held);
      const Tensor made = convolution.forward(held, padding);
      if (batch == 1) {
        out = made;
        break;
      }
      if (!out.defined()) {
        out = at::empty({batch, made.size(1), made.size(2), made.size(3)}, made.options(),
                        kChannelsLast);
      }
      out.narrow(0, index, 1).copy_(made);
      continue;
    }
    if (!out.defined()) {
      held = strip_memory(image, x.size(1), strip + 2 * margin);
      out = at::empty({batch, weight.size(0), x.size(2), x.size(3)}, map.options(), kChannelsLast);
    }
    for_strips(x.size(2), strip, [&](int64_t first, int64_t lines) {
      const Tensor normed = padded(image, first, lines, margin, held, apply);
      out.narrow(0, index, 1).narrow(2, first, lines).copy_(
          convolution.forward(normed, {0, padding[1]}));
    });
  }
  return out.to(x.scalar_type());
}

std::vector<Tensor> channel_norm_conv2d_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& x, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double eps, std::string_view before, std::string_view after,
    const Tensor& weight, const OptionalTensor& bias, bool transposed, at::IntArrayRef stride,
    at::IntArrayRef padding, at::TensorList, const c10::List<bool>& mask) {
  TORCH_CHECK(output_grads.size() == 1 && mask.size() == 11,
              "output_grads, output_mask: expected 1 and 11 entries");
  const ChannelNorm norm(norm_weight, norm_bias, eps, before, after, x);
  const Convolution convolution = convolution_of(x, weight, bias, transposed, stride, padding);
  const OptionalTensor given = output_grads[0];
  const bool parameters = mask[1] || mask[2], inside = mask[0] || parameters;
  const bool of_weight = mask[6], of_bias = mask[7];
  const Tensor sums = sums_for(x, parameters);
  Tensor x_grad, weight_grad, bias_grad;
  if (given.has_value() && x.size(0) > 0) {
    const Tensor map = as_map(x), whole_grad = as_map(*given);
    const auto wide = map.options().dtype(sum_type(map.scalar_type()));
    if (mask[0]) x_grad = like(map);
    const auto apply = [&](const Tensor& from, const Tensor& to) {
      norm.apply(from, std::nullopt, 1, to);
    };
    const auto copy = [](const Tensor& from, const Tensor& to) { to.copy_(from); };
    const auto add = [&](const Tensor& from, Tensor& to) {
      if (!to.defined()) to = at::zeros(from.sizes(), wide);
      to.add_(from);
    };
    const auto add_parameters = [&](const Tensor& grad, const Tensor& normed, at::IntArrayRef pad) {
      const auto found = convolution.backward(grad, normed, pad, {false, of_weight, of_bias});
      if (of_weight) add(std::get<1>(found), weight_grad);
      if (of_bias) add(std::get<2>(found), bias_grad);
    };
    const int64_t strip = convolution.strip(map), margin = padding[0], height = x.size(2);
    Tensor held, held_grad;
    for (int64_t index = 0; index < x.size(0); ++index) {
      const Tensor image = map.narrow(0, index, 1), grad = whole_grad.narrow(0, index, 1);
      if (strip == 0) {
        if (of_weight || of_bias) {
          if (!held.defined()) held = of_weight ? like(image) : image;
          if (of_weight) apply(image, held);
          add_parameters(grad, held, padding);
        }
        if (inside) {
          norm.gradient(convolution.input_gradient(grad, image, padding), image,
                        mask[0] ? x_grad.narrow(0, index, 1) : Tensor(), sums);
        }
        continue;
      }
      if (!held.defined()) {
        held = strip_memory(image, x.size(1), strip + 2 * margin);
        held_grad = strip_memory(image, weight.size(0), strip + 2 * margin);
      }
      for_strips(height, strip, [&](int64_t first, int64_t lines) {
        if (of_weight || of_bias) {
          add_parameters(grad.narrow(2, first, lines),
                         padded(image, first, lines, margin, held, apply), {0, padding[1]});
        }
        if (!inside) return;
        const bool within = first >= margin && first + lines + margin <= height;
        const Tensor around = within ? grad.narrow(2, first - margin, lines + 2 * margin)
                                     : padded(grad, first, lines, margin, held_grad, copy);
        const Tensor part = image.narrow(2, first, lines);
        // Twice the padding: only these lines of the image are asked for.
        norm.gradient(convolution.input_gradient(around, part, {2 * margin, padding[1]}), part,
                      mask[0] ? x_grad.narrow(0, index, 1).narrow(2, first, lines) : Tensor(), sums);
      });
    }
  }
  std::vector<Tensor> found;
  const auto push = [&](bool wanted, const Tensor& grad, const Tensor& input) {
    if (wanted) found.push_back(grad.defined() ? laid_out(grad, input) : at::zeros_like(input));
  };
  push(mask[0], x_grad, x);
  push_norm_grads(sums, norm_weight, norm_bias, mask[1], mask[2], found);
  push(of_weight, weight_grad, weight);
  if (of_bias) push(true, bias_grad, *bias);
  return found;
}

}  // namespace
}  // namespace spectralx::cpu

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("channel_norm_conv2d", &spectralx::cpu::channel_norm_conv2d);
  m.impl("channel_norm_conv2d_backward", &spectralx::cpu::channel_norm_conv2d_backward);
}
