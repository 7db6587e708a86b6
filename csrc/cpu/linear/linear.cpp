// spectralx::linear on the CPU: a linear layer by oneDNN's products. See
// spectralx_kernels/linear/README.md.
#include "cpu/torch.h"

#include <optional>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/common/linear.h"

namespace {

using namespace spectralx::cpu;
using at::Tensor;
using Optional = std::optional<Tensor>;

void check(const Tensor& x, const Tensor& weight, const Optional& bias) {
  TORCH_CHECK_VALUE(x.dim() > 0, "x: got no dimension, expected [.., width]");
  check_layer("weight", weight, bias, x.size(-1));
}

Tensor linear(const Tensor& x, const Tensor& weight, const Optional& bias) {
  check(x, weight, bias);
  return with_last(linear_layer(rows_of(x), weight, bias), x);
}

std::vector<Tensor> linear_backward(const c10::List<Optional>& output_grads, const Tensor& x,
                                    const Tensor& weight, const Optional& bias,
                                    at::TensorList /*saved*/, const c10::List<bool>& mask) {
  TORCH_CHECK(output_grads.size() == 1 && mask.size() == 3,
              "output_grads, output_mask: expected 1 and 3 entries");
  check(x, weight, bias);
  const Optional given = output_grads[0];
  std::vector<Tensor> wanted;
  if (!given.has_value() || x.numel() == 0) {
    if (mask[0]) wanted.push_back(at::zeros(x.sizes(), x.options()));
    if (mask[1]) wanted.push_back(at::zeros(weight.sizes(), weight.options()));
    if (mask[2]) wanted.push_back(at::zeros(bias->sizes(), bias->options()));
    return wanted;
  }
  const Tensor grad = rows_of(*given);
  if (mask[0]) {
    wanted.push_back(with_last(input_gradient(grad, turned(weight)), x));
  }
  if (mask[1]) wanted.push_back(weight_gradient(grad, rows_of(x)));
  if (mask[2]) {
    const auto type = accumulation_type(grad.scalar_type());
    wanted.push_back(grad.sum(0, false, type).to(bias->scalar_type()));
  }
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_backward", &linear_backward);
}
