// spectralx::channel_norm on the CPU. Maths: spectralx_kernels/reconstruction/README.md.
//
// Nothing but x is needed for backward: norms and activations of a row of channels are formed again.
// Tasks take a fixed number of rows and their sums are added up in order, so that results do not depend
// on the number of threads.
#include "cpu/reconstruction/channel_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace spectralx::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

constexpr int64_t kElements = 1 << 15;  // of a task: two maps of them fit in the L2 cache

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

// The parameters in the type of sums.
template <typename A>
struct Parameters {
  Tensor weight, bias;
  RowNorm<A> norm;

  Parameters(const ChannelNorm& given, int64_t channels) {
    norm = {nullptr, nullptr, static_cast<A>(given.eps), given.before, given.after, channels};
    if (!given.weight.has_value()) return;
    weight = given.weight->to(c10::CppTypeToScalarType<A>::value).contiguous();
    bias = given.bias->to(c10::CppTypeToScalarType<A>::value).contiguous();
    norm.weight = weight.const_data_ptr<A>();
    norm.bias = bias.const_data_ptr<A>();
  }
};

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
    const Parameters<A> by(*this, channels);
    const S* more = addend.has_value() ? addend->const_data_ptr<S>() : nullptr;
    for_tasks(x, [&](int64_t, int64_t row, int64_t rows) {
      std::vector<A> scratch(rows_together(channels) * channels);
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
    const Parameters<A> by(*this, channels);
    const int64_t most = std::max<int64_t>(kElements / channels, 1);
    const int64_t tasks = (x.numel() / channels + most - 1) / most;
    std::vector<A> parts(sums.defined() ? tasks * 2 * channels : 0, A(0));
    for_tasks(x, [&](int64_t task, int64_t row, int64_t rows) {
      std::vector<A> scratch(3 * rows_together(channels) * channels);
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

}  // namespace
}  // namespace spectralx::cpu

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("channel_norm", &spectralx::cpu::channel_norm);
  m.impl("channel_norm_backward", &spectralx::cpu::channel_norm_backward);
}
