// The type that products of tensors run in, and tensors in it.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cpu/common/product.h"

namespace spectralx::cpu {

// What the products of this dtype are taken in.
inline at::ScalarType operand_type(const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  if (type == at::kDouble) return type;
  return type == at::kBFloat16 && multiplies_bfloat16() ? type : at::kFloat;
}

template <typename Run>
void with_operands(at::ScalarType type, const Run& run) {
  if (type == at::kDouble) return run(double());
  if (type == at::kFloat) return run(float());
  run(c10::BFloat16());
}

inline at::Tensor operands(const std::optional<at::Tensor>& tensor, at::ScalarType type) {
  return tensor.has_value() ? tensor->to(type).contiguous() : at::Tensor();
}

}  // namespace spectralx::cpu
