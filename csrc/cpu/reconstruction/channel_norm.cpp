// spectralx::channel_norm and channel_norm_conv2d on the CPU. Maths:
// spectralx_kernels/reconstruction/README.md.
//
// Nothing but x is needed for backward: norms and activations of a row of channels are formed again.
// Wide float maps are convolved a line at a time (line_convolution.cpp); of others the map that the
// vendor's convolution takes exists for some images at a time. Tasks take a fixed number of rows and their
// sums are added up in order, so that results do not depend on the number of threads.
#include "cpu/torch.h"

#include "cpu/reconstruction/channel_norm.h"
#include "cpu/reconstruction/line_convolution.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

namespace spectralx::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr int64_t kElements = 1 << 15;  // of a task: two maps of them fit in the L2 cache
constexpr int64_t kMapBytes = 1 << 27;  // of normed maps that exist at a time in forward

Activation activation_of(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  TORCH_CHECK_VALUE(name == "leaky_relu", "activation: got ", name,
                    ", expected none, gelu, relu or leaky_relu");
  return Activation::kLeakyRelu;
}

// use(task, first row, rows) for all rows of the map, in any order.
template <typename Use>
int64_t for_tasks(const Tensor& x, const Use& use) {
  const int64_t rows = x.size(0) * x.size(2) * x.size(3);
  const int64_t most = std::max<int64_t>(kElements / x.size(1), 1), tasks = (rows + most - 1) / most;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      use(task, task * most, std::min(most, rows - task * most));
    }
  });
  return tasks;
}

}  // namespace

ChannelNorm::ChannelNorm(const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                         std::string_view before, std::string_view after, const Tensor& x)
    : weight(weight), bias(bias), eps(eps), before(activation_of(before)), after(activation_of(after)) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) > 0, "x: got shape ", x.sizes(),
                    ", expected [batch, channels, height, width]");
  TORCH_CHECK_VALUE(weight.has_value() == bias.has_value(),
                    "weight, bias: expected both of a norm or neither");
  TORCH_CHECK_VALUE(!weight.has_value() || (weight->numel() == x.size(1) && bias->numel() == x.size(1)),
                    "weight, bias: got ", weight->numel(), " and ", bias->numel(), " values, expected ",
                    x.size(1), " each");
}

void ChannelNorm::apply(const Tensor& x, const OptionalTensor& addend, double scale,
                        const Tensor& out) const {
  const int64_t channels = x.size(1);
  SPECTRALX_DISPATCH(x.scalar_type(), [&] {
    const NormParameters<A> by(*this, channels);
    const S* more = addend.has_value() ? addend->const_data_ptr<S>() : nullptr;
    for_tasks(x, [&](int64_t, int64_t row, int64_t rows) {
      std::vector<A> scratch(channels);
      head_kernels<S, A>().norm(x.const_data_ptr<S>() + row * channels,
                                more == nullptr ? nullptr : more + row * channels, rows, by.norm,
                                static_cast<A>(scale), scratch.data(),
                                data<S>(out) + row * channels);
    });
  });
}

void ChannelNorm::gradient(const Tensor& grad, const Tensor& x, const Tensor& x_grad,
                           const Tensor& sums) const {
  const int64_t channels = x.size(1);
  SPECTRALX_DISPATCH(x.scalar_type(), [&] {
    const NormParameters<A> by(*this, channels);
    const int64_t most = std::max<int64_t>(kElements / channels, 1);
    const int64_t tasks = (x.numel() / channels + most - 1) / most;
    std::vector<A> parts(sums.defined() ? tasks * 2 * channels : 0, A(0));
    for_tasks(x, [&](int64_t task, int64_t row, int64_t rows) {
      std::vector<A> scratch(3 * channels);
      A* to = sums.defined() ? parts.data() + task * 2 * channels : nullptr;
      head_kernels<S, A>().norm_gradient(
          grad.const_data_ptr<S>() + row * channels, x.const_data_ptr<S>() + row * channels, rows,
          by.norm, scratch.data(), x_grad.defined() ? data<S>(x_grad) + row * channels : nullptr, to,
          to == nullptr ? nullptr : to + channels);
    });
    for (size_t i = 0; i < parts.size(); ++i) data<double>(sums)[i % (2 * channels)] += parts[i];
  });
}

Tensor as_map(const Tensor& x) {
  const auto type = map_type(x.scalar_type());
  Tensor map;
  SPECTRALX_DISPATCH(type, [&] { map = channels_last<S, A>(x.to(type)); });
  return map;
}

namespace {

Tensor like(const Tensor& map) { return at::empty(map.sizes(), map.options(), kChannelsLast); }

OptionalTensor converted(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor.has_value() ? OptionalTensor(tensor->to(type)) : std::nullopt;
}

Tensor channel_norm(const Tensor& x, const OptionalTensor& addend, const Tensor& weight,
                    const Tensor& bias, double eps, std::string_view before, std::string_view after,
                    double scale) {
  const ChannelNorm norm(weight, bias, eps, before, after, x);
  TORCH_CHECK_VALUE(!addend.has_value() || addend->sizes() == x.sizes(),
                    "addend: expected the shape of x");
  const Tensor map = as_map(x), out = like(map);
  norm.apply(map, addend.has_value() ? OptionalTensor(as_map(*addend)) : std::nullopt, scale, out);
  return out.to(x.scalar_type());
}

// The wanted gradients of weight and bias of a norm, behind those in `found`.
void push_norm_grads(const Tensor& sums, const OptionalTensor& weight, const OptionalTensor& bias,
                     bool wants_weight, bool wants_bias, std::vector<Tensor>& found) {
  if (wants_weight) found.push_back(sums.select(0, 0).to(weight->scalar_type(), false, true));
  if (wants_bias) found.push_back(sums.select(0, 1).to(bias->scalar_type(), false, true));
}

Tensor sums_for(const Tensor& x, bool wanted) {
  return wanted ? at::zeros({2, x.size(1)}, x.options().dtype(at::kDouble)) : Tensor();
}

std::vector<Tensor> channel_norm_backward(const c10::List<OptionalTensor>& output_grads,
                                          const Tensor& x, const OptionalTensor& addend,
                                          const Tensor& weight, const Tensor& bias, double eps,
                                          std::string_view before, std::string_view after, double scale,
                                          at::TensorList, const c10::List<bool>& mask) {
  TORCH_CHECK(output_grads.size() == 1 && mask.size() == 8,
              "output_grads, output_mask: expected 1 and 8 entries");
  const ChannelNorm norm(weight, bias, eps, before, after, x);
  const OptionalTensor given = output_grads[0];
  const Tensor sums = sums_for(x, mask[2] || mask[3]);
  std::vector<Tensor> found;
  Tensor x_grad, grad;
  if (given.has_value()) {
    grad = as_map(*given);
    if (mask[0]) x_grad = like(grad);
    if (mask[0] || mask[2] || mask[3]) norm.gradient(grad, as_map(x), x_grad, sums);
  }
  if (mask[0]) found.push_back(x_grad.defined() ? laid_out(x_grad, x) : at::zeros_like(x));
  if (mask[1]) {
    found.push_back(grad.defined() ? laid_out(grad * scale, *addend) : at::zeros_like(*addend));
  }
  push_norm_grads(sums, weight, bias, mask[2], mask[3], found);
  return found;
}

void check_convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       bool transposed, at::IntArrayRef stride, at::IntArrayRef padding) {
  const int64_t ins = transposed ? 0 : 1;
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(ins) == x.size(1), "weight: got shape ",
                    weight.sizes(), ", expected ", x.size(1), " channels in");
  TORCH_CHECK_VALUE(!bias.has_value() || bias->numel() == weight.size(1 - ins), "bias: got ",
                    bias->numel(), " values, expected ", weight.size(1 - ins));
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2,
                    "stride, padding: expected two integers each");
}

Tensor channel_norm_conv2d(const Tensor& x, const OptionalTensor& norm_weight,
                           const OptionalTensor& norm_bias, double eps, std::string_view before,
                           std::string_view after, const Tensor& weight, const OptionalTensor& bias,
                           bool transposed, at::IntArrayRef stride, at::IntArrayRef padding) {
  const ChannelNorm norm(norm_weight, norm_bias, eps, before, after, x);
  check_convolution(x, weight, bias, transposed, stride, padding);
  const Tensor map = as_map(x), kernel = weight.to(map.scalar_type());
  const OptionalTensor offset = converted(bias, map.scalar_type());
  if (LineConvolution::takes(map, kernel, transposed, stride, padding)) {
    const LineConvolution lines(map, kernel, transposed, stride, padding);
    return lines.forward(map, norm, offset).to(x.scalar_type());
  }
  const int64_t batch = x.size(0), bytes = x.numel() / std::max<int64_t>(batch, 1) * map.itemsize();
  const int64_t most = std::max<int64_t>(kMapBytes / std::max<int64_t>(bytes, 1), 1);
  Tensor out;
  for (int64_t image = 0; image < std::max<int64_t>(batch, 1); image += most) {
    const int64_t count = std::min(most, batch - image);
    const Tensor part = map.narrow(0, image, count), normed = like(part);
    norm.apply(part, std::nullopt, 1, normed);
    const Tensor made = at::convolution(normed, kernel, offset, stride, padding, {1, 1}, transposed,
                                        {0, 0}, 1)
                            .contiguous(kChannelsLast);
    if (count == batch) {
      out = made;
    } else {
      if (!out.defined()) {
        out = at::empty({batch, made.size(1), made.size(2), made.size(3)}, made.options(),
                        kChannelsLast);
      }
      out.narrow(0, image, count).copy_(made);
    }
  }
  return out.to(x.scalar_type());
}

// The gradients of channel_norm_conv2d by the vendor's convolution: of the weight, of the bias, and
// those of `norm`, which go to `x_grad` and `sums`. An image at a time, and first the parameters of
// all: no more than one normed map exists, and none beside its gradient.
std::tuple<Tensor, Tensor> vendor_backward(const Tensor& grad, const Tensor& map,
                                           const ChannelNorm& norm, const Tensor& kernel,
                                           bool transposed, at::IntArrayRef stride,
                                           at::IntArrayRef padding, bool wants_x, bool wants_weight,
                                           bool wants_bias, Tensor& x_grad, const Tensor& sums) {
  Tensor weight_grad, bias_grad;
  const auto sum_options = map.options().dtype(sum_type(map.scalar_type()));
  const auto convolve_back = [&](int64_t image, const Tensor& normed, std::array<bool, 3> want) {
    return at::convolution_backward(grad.narrow(0, image, 1), normed, kernel,
                                    at::IntArrayRef({kernel.size(transposed ? 1 : 0)}), stride,
                                    padding, {1, 1}, transposed, {0, 0}, 1, want);
  };
  const auto add = [&](const Tensor& from, Tensor& to) {
    if (!to.defined()) to = at::zeros(from.sizes(), sum_options);
    to.add_(from);
  };
  Tensor normed = wants_weight ? like(map.narrow(0, 0, 1)) : Tensor();
  for (int64_t image = 0; image < map.size(0) && (wants_weight || wants_bias); ++image) {
    const Tensor part = map.narrow(0, image, 1);
    if (wants_weight) norm.apply(part, std::nullopt, 1, normed);
    const auto found =
        convolve_back(image, wants_weight ? normed : part, {false, wants_weight, wants_bias});
    if (wants_weight) add(std::get<1>(found), weight_grad);
    if (wants_bias) add(std::get<2>(found), bias_grad);
  }
  normed.reset();
  if (wants_x) x_grad = like(map);
  for (int64_t image = 0; image < map.size(0) && (wants_x || sums.defined()); ++image) {
    const Tensor part = map.narrow(0, image, 1);  // its shape alone tells the convolution something
    const Tensor back = std::get<0>(convolve_back(image, part, {true, false, false}));
    const Tensor to = wants_x ? x_grad.narrow(0, image, 1) : Tensor();
    norm.gradient(back.contiguous(kChannelsLast), part, to, sums);
  }
  return {weight_grad, bias_grad};
}

std::vector<Tensor> channel_norm_conv2d_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& x, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double eps, std::string_view before, std::string_view after,
    const Tensor& weight, const OptionalTensor& bias, bool transposed, at::IntArrayRef stride,
    at::IntArrayRef padding, at::TensorList, const c10::List<bool>& mask) {
  TORCH_CHECK(output_grads.size() == 1 && mask.size() == 11,
              "output_grads, output_mask: expected 1 and 11 entries");
  const ChannelNorm norm(norm_weight, norm_bias, eps, before, after, x);
  check_convolution(x, weight, bias, transposed, stride, padding);
  const OptionalTensor given = output_grads[0];
  const bool parameters = mask[1] || mask[2];
  const Tensor sums = sums_for(x, parameters);
  Tensor x_grad, weight_grad, bias_grad;
  if (given.has_value() && x.size(0) > 0) {
    const Tensor map = as_map(x), grad = as_map(*given), kernel = weight.to(map.scalar_type());
    if (LineConvolution::takes(map, kernel, transposed, stride, padding)) {
      if (mask[0]) x_grad = like(map);
      if (mask[0] || parameters || mask[6]) {
        weight_grad = LineConvolution(map, kernel, transposed, stride, padding)
                          .backward(grad, map, norm, x_grad, sums, mask[6]);
      }
      if (mask[7]) bias_grad = rows_of_map(grad).sum(0);
    } else {
      std::tie(weight_grad, bias_grad) =
          vendor_backward(grad, map, norm, kernel, transposed, stride, padding, mask[0], mask[6],
                          mask[7], x_grad, sums);
    }
  }
  std::vector<Tensor> found;
  const auto push = [&](bool wanted, const Tensor& grad, const Tensor& input) {
    if (wanted) found.push_back(grad.defined() ? laid_out(grad, input) : at::zeros_like(input));
  };
  push(mask[0], x_grad, x);
  push_norm_grads(sums, norm_weight, norm_bias, mask[1], mask[2], found);
  push(mask[6], weight_grad, weight);
  if (mask[7]) push(true, bias_grad, *bias);
  return found;
}

}  // namespace
}  // namespace spectralx::cpu

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("channel_norm", &spectralx::cpu::channel_norm);
  m.impl("channel_norm_backward", &spectralx::cpu::channel_norm_backward);
  m.impl("channel_norm_conv2d", &spectralx::cpu::channel_norm_conv2d);
  m.impl("channel_norm_conv2d_backward", &spectralx::cpu::channel_norm_conv2d_backward);
}
