// spectralx::aomoa on the CPU: checks, the choice of the type its products run in, registration.
// Maths: spectralx_kernels/aomoa/README.md.
#include "cpu/torch.h"

#include <array>

#include "cpu/aomoa/gating.h"
#include "cpu/aomoa/layer.h"
#include "cpu/common/linear.h"

namespace {

using namespace spectralx::cpu;

constexpr int64_t kTensors = 17, kArguments = 19;

Arguments checked(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  const Tensor& scaler, const Tensor& norm1_weight, const Tensor& norm1_bias,
                  const Tensor& down, const Tensor& norm2_weight, const Tensor& norm2_bias,
                  const Tensor& gate, const Tensor& gate_noise, const std::optional<Tensor>& noise,
                  const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
                  const Tensor& fc2_bias, const Tensor& up, int64_t top_k, double norm_eps) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && down.dim() == 2 && gate.dim() == 3 &&
                  fc1_weight.dim() == 3 && up.dim() == 2,
              "x, weight, down, gate, fc1_weight, up: got ", x.dim(), ", ", weight.dim(), ", ",
              down.dim(), ", ", gate.dim(), ", ", fc1_weight.dim(), ", ", up.dim(),
              " dimensions, expected 2, 2, 2, 3, 3, 2");
  const int64_t attributes = gate.size(0), rank = gate.size(1), experts = gate.size(2),
                hidden = fc1_weight.size(1), d = down.size(1), out = up.size(0);
  const auto check = [](const char* name, const Tensor& tensor, at::IntArrayRef shape) {
    TORCH_CHECK(tensor.sizes() == shape, name, ": got shape ", tensor.sizes(), ", expected ",
                shape);
  };
  check("x", x, {x.size(0), attributes * d});
  check("weight", weight, {attributes * out, attributes * d});
  if (bias.has_value()) check("bias", *bias, {attributes * out});
  check("scaler", scaler, {attributes * out});
  check("norm1_weight", norm1_weight, {d});
  check("norm1_bias", norm1_bias, {d});
  check("down", down, {rank, d});
  check("norm2_weight", norm2_weight, {rank});
  check("norm2_bias", norm2_bias, {rank});
  check("gate_noise", gate_noise, {attributes, rank, experts});
  if (noise.has_value()) check("noise", *noise, {attributes, x.size(0), experts});
  check("fc1_weight", fc1_weight, {experts, hidden, rank});
  check("fc1_bias", fc1_bias, {experts, hidden});
  check("fc2_weight", fc2_weight, {experts, rank, hidden});
  check("fc2_bias", fc2_bias, {experts, rank});
  check("up", up, {out, rank});
  TORCH_CHECK(top_k >= 1 && top_k <= experts, "top_k: got ", top_k, ", expected 1 to ", experts);
  return {x,    weight,     scaler,     norm1_weight, norm1_bias, down,
          norm2_weight, norm2_bias, gate,       gate_noise,   fc1_weight, fc1_bias,
          fc2_weight,   fc2_bias,   up,         bias,         noise,      top_k,
          norm_eps};
}

// The type of the products, or Undefined: then the vendor's library runs the frozen layer in the type
// of x, and the adapter runs in float. Products of bfloat16 take pairs of their inner dimension.
at::ScalarType product_type(const Arguments& p) {
  const auto type = p.x.scalar_type();
  if (type == at::kFloat || type == at::kDouble) return type;
  const bool even = p.down.size(1) % 2 == 0 && p.down.size(0) % 2 == 0 &&
                    p.fc1_weight.size(1) % 2 == 0 && p.up.size(0) % 2 == 0;
  return type == at::kBFloat16 && even && multiplies_bfloat16() ? type : at::ScalarType::Undefined;
}

// The frozen weight's gradient, where one is wanted after all: doutᵀ x, 128 rows a task.
Tensor frozen_gradient(const Tensor& dout, const Tensor& x) {
  constexpr int64_t kRows = 128;
  const Tensor left = dout.detach(), right = x.detach();  // threads have a grad mode of their own
  const Tensor grad = at::empty({dout.size(1), x.size(1)}, x.options());
  over_products(blocks_of(grad.size(0), kRows), [&](int64_t first, int64_t last) {
    for (int64_t begin = first * kRows; begin < std::min(last * kRows, grad.size(0)); begin += kRows) {
      const int64_t count = std::min(kRows, grad.size(0) - begin);
      grad.narrow(0, begin, count).copy_(weight_gradient(left.narrow(1, begin, count), right));
    }
  });
  return grad;
}

template <typename F>
auto with_product_type(at::ScalarType type, const F& run) {
  if (type == at::kFloat) return run(float());
  if (type == at::kDouble) return run(double());
  return run(c10::BFloat16());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> aomoa(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& scaler, const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& down,
    const Tensor& norm2_weight, const Tensor& norm2_bias, const Tensor& gate,
    const Tensor& gate_noise, const std::optional<Tensor>& noise, const Tensor& fc1_weight,
    const Tensor& fc1_bias, const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& up,
    int64_t top_k, double norm_eps) {
  const Arguments p = checked(x, weight, bias, scaler, norm1_weight, norm1_bias, down,
                              norm2_weight, norm2_bias, gate, gate_noise, noise, fc1_weight,
                              fc1_bias, fc2_weight, fc2_bias, up, top_k, norm_eps);
  const auto type = product_type(p);
  Outputs outputs;
  if (type == at::ScalarType::Undefined) {
    outputs = forward<float>(p, false);
    outputs.out = outputs.out.add_(at::linear(x, weight.to(x.scalar_type()), bias)).to(x.scalar_type());
  } else {
    outputs = with_product_type(type, [&](auto tag) { return forward<decltype(tag)>(p, true); });
  }
  return {outputs.out, outputs.gates, outputs.load, outputs.normed, outputs.statistics};
}

// output_mask names the inputs in the order of the schema; the wanted gradients come in that order.
std::vector<Tensor> aomoa_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& scaler, const Tensor& norm1_weight,
    const Tensor& norm1_bias, const Tensor& down, const Tensor& norm2_weight,
    const Tensor& norm2_bias, const Tensor& gate, const Tensor& gate_noise,
    const std::optional<Tensor>& noise, const Tensor& fc1_weight, const Tensor& fc1_bias,
    const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& up, int64_t top_k,
    double norm_eps, at::TensorList saved, const c10::List<bool>& output_mask) {
  const Arguments p = checked(x, weight, bias, scaler, norm1_weight, norm1_bias, down,
                              norm2_weight, norm2_bias, gate, gate_noise, noise, fc1_weight,
                              fc1_bias, fc2_weight, fc2_bias, up, top_k, norm_eps);
  TORCH_CHECK(output_grads.size() == 3, "output_grads: got ", output_grads.size(), ", expected 3");
  TORCH_CHECK(output_mask.size() == kArguments, "output_mask: got ", output_mask.size(),
              ", expected ", kArguments);
  TORCH_CHECK(saved.size() == 3, "saved: got ", saved.size(), " tensors, expected 3");
  const auto wide = accumulation_type(x.scalar_type());
  const auto incoming = [&](size_t i, at::ScalarType type) -> std::optional<Tensor> {
    const std::optional<Tensor> grad = output_grads[i];
    if (!grad.has_value()) return std::nullopt;
    return grad->to(type).contiguous();
  };
  const auto given = incoming(0, x.scalar_type());
  const Tensor dout =
      given.has_value() ? *given : at::zeros({x.size(0), weight.size(0)}, x.options());
  const auto type = product_type(p);
  const bool frozen = type != at::ScalarType::Undefined;
  const Incoming in{frozen ? dout : dout.to(at::kFloat),
                    incoming(1, wide),
                    incoming(2, wide),
                    saved[0],
                    saved[1].contiguous(),
                    saved[2].contiguous(),
                    output_mask[0],
                    output_mask[11]};
  Gradients grads;
  if (frozen) {
    grads = with_product_type(type, [&](auto tag) { return backward<decltype(tag)>(p, in, true); });
  } else {
    grads = backward<float>(p, in, false);
    if (in.want_x) grads.x.add_(at::mm(dout, weight.to(dout.scalar_type())));
  }

  const std::array<Tensor, kTensors> inputs = {
      x, weight, bias.value_or(Tensor()), scaler, norm1_weight, norm1_bias, down, norm2_weight,
      norm2_bias, gate, gate_noise, noise.value_or(Tensor()), fc1_weight, fc1_bias, fc2_weight,
      fc2_bias, up};
  const std::array<Tensor, kTensors> computed = {
      grads.x,
      output_mask[1] ? frozen_gradient(dout, x) : Tensor(),
      output_mask[2] ? dout.sum(0, false, wide) : Tensor(),
      grads.scaler,
      grads.norm1_weight,
      grads.norm1_bias,
      grads.down,
      grads.norm2_weight,
      grads.norm2_bias,
      grads.gate,
      grads.gate_noise,
      grads.noise,
      grads.fc1_weight,
      grads.fc1_bias,
      grads.fc2_weight,
      grads.fc2_bias,
      grads.up};
  std::vector<Tensor> wanted;
  for (int64_t i = 0; i < kTensors; ++i) {
    if (output_mask[i]) wanted.push_back(computed[i].to(inputs[i].scalar_type()).contiguous());
  }
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("aomoa", &aomoa);
  m.impl("aomoa_backward", &aomoa_backward);
}
