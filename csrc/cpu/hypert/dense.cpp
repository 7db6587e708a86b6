// spectralx::norm_linear, linear_add and feed_forward on the CPU: what stands around attention, by
// oneDNN's products with what follows them in their epilogue. Layer norms and hidden layers are
// made again in backward, which is given the inputs alone.
#include "cpu/torch.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/common/linear.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using spectralx::cpu::accumulation_type;
using spectralx::cpu::check_layer;
using spectralx::cpu::input_gradient;
using spectralx::cpu::linear_layer;
using spectralx::cpu::rows_of;
using spectralx::cpu::turned;
using spectralx::cpu::weight_gradient;
using spectralx::cpu::with_last;

// Rows of a hidden layer that exist at a time, and in backward, which holds several of them.
constexpr int64_t kRows = 1024, kBackwardRows = 1024;

void check_norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const at::IntArrayRef expected = x.sizes().slice(x.dim() - 1);
  TORCH_CHECK_VALUE(weight.sizes() == expected && bias.sizes() == expected,
                    "norm_weight, norm_bias: got shapes ", weight.sizes(), " and ", bias.sizes(),
                    ", expected ", expected);
}

// A sum over chunks of rows, in order, in the type sums are formed in if there are several.
struct Sum {
  Tensor total;

  void add(const Tensor& part) {
    if (!total.defined()) {
      total = part;
    } else {
      total = total.to(accumulation_type(part.scalar_type())).add_(part);
    }
  }
  Tensor of(const Tensor& like) const {
    return total.defined() ? total.to(like.scalar_type()) : at::zeros(like.sizes(), like.options());
  }
};

// Which gradients a layer's weight and bias want, and their sums.
struct LayerGradients {
  bool want_weight, want_bias;
  Sum weight, bias;

  // `x` makes what the layer was given, if that is needed, and it is not held any longer than that.
  template <typename Make>
  void add(const Tensor& dout, Make x) {
    if (want_weight) weight.add(weight_gradient(dout, x()));
    if (want_bias) bias.add(dout.sum(0, false, accumulation_type(dout.scalar_type())));
  }
};

struct NormGradients {
  bool want_weight, want_bias;
  Sum weight, bias;
};

struct Norm {
  Tensor weight, bias;
  double eps;
  Tensor mean, rstd;

  Tensor forward(const Tensor& x) {
    Tensor out;
    std::tie(out, mean, rstd) = at::native_layer_norm(x, {x.size(1)}, weight, bias, eps);
    return out;
  }
  // The gradient of x; undefined unless wanted.
  Tensor backward(const Tensor& dout, const Tensor& x, bool want_x, NormGradients& grads) const {
    auto [dx, dweight, dbias] = at::native_layer_norm_backward(
        dout, x, {x.size(1)}, mean, rstd, weight, bias,
        {want_x, grads.want_weight, grads.want_bias});
    if (grads.want_weight) grads.weight.add(dweight);
    if (grads.want_bias) grads.bias.add(dbias);
    return dx;
  }
};

Tensor rows_of_grad(const c10::List<Optional>& output_grads, const Tensor& x, int64_t out) {
  TORCH_CHECK(output_grads.size() == 1, "output_grads: got ", output_grads.size(), ", expected 1");
  const Optional grad = output_grads[0];
  const int64_t rows = x.numel() / x.size(-1);
  if (!grad.has_value()) return at::zeros({rows, out}, x.options());
  return grad->reshape({rows, out}).contiguous();
}

// x [.., D]: linear_layer(layer_norm(x)).
Tensor norm_linear(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                   const Tensor& weight, const Optional& bias, double norm_eps) {
  check_norm(x, norm_weight, norm_bias);
  check_layer("weight", weight, bias, x.size(-1));
  Norm norm{norm_weight, norm_bias, norm_eps, {}, {}};
  return with_last(linear_layer(norm.forward(rows_of(x)), weight.contiguous(), bias), x);
}

std::vector<Tensor> norm_linear_backward(const c10::List<Optional>& output_grads, const Tensor& x,
                                         const Tensor& norm_weight, const Tensor& norm_bias,
                                         const Tensor& weight, const Optional& bias,
                                         double norm_eps, at::TensorList /*saved*/,
                                         const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_mask.size() == 6, "output_mask: got ", output_mask.size(), ", expected 6");
  check_norm(x, norm_weight, norm_bias);
  check_layer("weight", weight, bias, x.size(-1));
  const Tensor dout = rows_of_grad(output_grads, x, weight.size(0)), rows = rows_of(x);
  Norm norm{norm_weight, norm_bias, norm_eps, {}, {}};
  NormGradients norm_grads{output_mask[1], output_mask[2], {}, {}};
  LayerGradients layer_grads{output_mask[3], output_mask[4], {}, {}};
  Tensor normed = norm.forward(rows);
  layer_grads.add(dout, [&] { return std::move(normed); });
  Tensor dx;
  if (output_mask[0] || output_mask[1] || output_mask[2]) {
    dx = norm.backward(input_gradient(dout, turned(weight)), rows, output_mask[0], norm_grads);
  }
  std::vector<Tensor> wanted;
  if (output_mask[0]) wanted.push_back(dx.view(x.sizes()));
  if (output_mask[1]) wanted.push_back(norm_grads.weight.of(norm_weight));
  if (output_mask[2]) wanted.push_back(norm_grads.bias.of(norm_bias));
  if (output_mask[3]) wanted.push_back(layer_grads.weight.of(weight));
  if (output_mask[4]) wanted.push_back(layer_grads.bias.of(*bias));
  return wanted;
}

// addend [.., O] + linear_layer(x [.., D]).
Tensor linear_add(const Tensor& x, const Tensor& weight, const Optional& bias,
                  const Tensor& addend) {
  check_layer("weight", weight, bias, x.size(-1));
  const Tensor rows = rows_of(x);
  TORCH_CHECK_VALUE(addend.numel() == rows.size(0) * weight.size(0), "addend: got shape ",
                    addend.sizes(), ", expected that of x but for ", weight.size(0), " at its end");
  return linear_layer(rows, weight.contiguous(), bias, false, rows_of(addend)).view(addend.sizes());
}

std::vector<Tensor> linear_add_backward(const c10::List<Optional>& output_grads, const Tensor& x,
                                        const Tensor& weight, const Optional& bias,
                                        const Tensor& addend, at::TensorList /*saved*/,
                                        const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_mask.size() == 4, "output_mask: got ", output_mask.size(), ", expected 4");
  check_layer("weight", weight, bias, x.size(-1));
  const Tensor dout = rows_of_grad(output_grads, x, weight.size(0));
  LayerGradients layer_grads{output_mask[1], output_mask[2], {}, {}};
  layer_grads.add(dout, [&] { return rows_of(x); });
  std::vector<Tensor> wanted;
  if (output_mask[0]) wanted.push_back(input_gradient(dout, turned(weight)).view(x.sizes()));
  if (output_mask[1]) wanted.push_back(layer_grads.weight.of(weight));
  if (output_mask[2]) wanted.push_back(layer_grads.bias.of(*bias));
  // Not the incoming gradient itself: no output of an operator is one of its inputs.
  if (output_mask[3]) wanted.push_back(dout.view(addend.sizes()).clone());
  return wanted;
}

// x [.., D] (if `residual`) + fc2(gelu(fc1(layer_norm(x)))), the hidden layer in chunks of rows.
Tensor feed_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                    const Tensor& fc1_weight, const Optional& fc1_bias, const Tensor& fc2_weight,
                    const Optional& fc2_bias, bool residual, double norm_eps) {
  check_norm(x, norm_weight, norm_bias);
  check_layer("fc1_weight", fc1_weight, fc1_bias, x.size(-1));
  check_layer("fc2_weight", fc2_weight, fc2_bias, fc1_weight.size(0));
  TORCH_CHECK_VALUE(!residual || fc2_weight.size(0) == x.size(-1), "fc2_weight: got shape ",
                    fc2_weight.sizes(), ", expected [", x.size(-1), ", hidden]");
  const Tensor rows = rows_of(x), fc1 = fc1_weight.contiguous(), fc2 = fc2_weight.contiguous();
  const int64_t count = rows.size(0);
  const auto chunk = [&](const Tensor& part) {
    Norm norm{norm_weight, norm_bias, norm_eps, {}, {}};
    const Tensor hidden = linear_layer(norm.forward(part), fc1, fc1_bias, true);
    return linear_layer(hidden, fc2, fc2_bias, false, residual ? Optional(part) : std::nullopt);
  };
  if (count <= kRows) return with_last(chunk(rows), x);
  const Tensor out = at::empty({count, fc2.size(0)}, x.options());
  for (int64_t first = 0; first < count; first += kRows) {
    const int64_t size = std::min(kRows, count - first);
    out.narrow(0, first, size).copy_(chunk(rows.narrow(0, first, size)));
  }
  return with_last(out, x);
}

std::vector<Tensor> feed_forward_backward(
    const c10::List<Optional>& output_grads, const Tensor& x, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& fc1_weight, const Optional& fc1_bias,
    const Tensor& fc2_weight, const Optional& fc2_bias, bool residual, double norm_eps,
    at::TensorList /*saved*/, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_mask.size() == 9, "output_mask: got ", output_mask.size(), ", expected 9");
  check_norm(x, norm_weight, norm_bias);
  check_layer("fc1_weight", fc1_weight, fc1_bias, x.size(-1));
  check_layer("fc2_weight", fc2_weight, fc2_bias, fc1_weight.size(0));
  const Tensor dout = rows_of_grad(output_grads, x, fc2_weight.size(0)), rows = rows_of(x);
  const Tensor fc1 = fc1_weight.contiguous();
  const int64_t count = rows.size(0);
  NormGradients norm_grads{output_mask[1], output_mask[2], {}, {}};
  LayerGradients fc1_grads{output_mask[3], output_mask[4], {}, {}};
  LayerGradients fc2_grads{output_mask[5], output_mask[6], {}, {}};
  const bool to_norm = output_mask[0] || output_mask[1] || output_mask[2];
  const bool to_hidden = to_norm || output_mask[3] || output_mask[4];
  const Tensor dx = output_mask[0] ? at::empty_like(rows) : Tensor();
  Tensor turned_fc1, turned_fc2;  // made where first needed, gone after the last chunk's use
  for (int64_t first = 0; first < count; first += kBackwardRows) {
    const int64_t size = std::min(kBackwardRows, count - first);
    const bool last = first + size == count;
    const Tensor part = rows.narrow(0, first, size), dpart = dout.narrow(0, first, size);
    Norm norm{norm_weight, norm_bias, norm_eps, {}, {}};
    Tensor normed = norm.forward(part), hidden = linear_layer(normed, fc1, fc1_bias);
    fc2_grads.add(dpart, [&] { return at::gelu(hidden); });
    if (!to_hidden) continue;
    if (!turned_fc2.defined()) turned_fc2 = turned(fc2_weight);
    Tensor dhidden = input_gradient(dpart, turned_fc2);
    if (last) turned_fc2.reset();
    at::gelu_backward_out(dhidden, dhidden, hidden);
    hidden.reset();
    fc1_grads.add(dhidden, [&] { return std::move(normed); });
    if (!to_norm) continue;
    if (!turned_fc1.defined()) turned_fc1 = turned(fc1);
    normed = input_gradient(dhidden, turned_fc1);
    if (last) turned_fc1.reset();
    dhidden.reset();
    const Tensor dnorm = norm.backward(normed, part, output_mask[0], norm_grads);
    if (!output_mask[0]) continue;
    dx.narrow(0, first, size).copy_(residual ? dnorm.add_(dpart) : dnorm);
  }
  std::vector<Tensor> wanted;
  if (output_mask[0]) wanted.push_back(dx.view(x.sizes()));
  if (output_mask[1]) wanted.push_back(norm_grads.weight.of(norm_weight));
  if (output_mask[2]) wanted.push_back(norm_grads.bias.of(norm_bias));
  if (output_mask[3]) wanted.push_back(fc1_grads.weight.of(fc1_weight));
  if (output_mask[4]) wanted.push_back(fc1_grads.bias.of(*fc1_bias));
  if (output_mask[5]) wanted.push_back(fc2_grads.weight.of(fc2_weight));
  if (output_mask[6]) wanted.push_back(fc2_grads.bias.of(*fc2_bias));
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("norm_linear", &norm_linear);
  m.impl("norm_linear_backward", &norm_linear_backward);
  m.impl("linear_add", &linear_add);
  m.impl("linear_add_backward", &linear_add_backward);
  m.impl("feed_forward", &feed_forward);
  m.impl("feed_forward_backward", &feed_forward_backward);
}
