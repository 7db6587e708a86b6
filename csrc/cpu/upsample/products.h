// Matrix products of small operands, each on the calling thread when inside a parallel region.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string_view>

#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

// What the products of this dtype are taken in: itself where the processor multiplies it, else
// float.
inline at::ScalarType product_type(at::ScalarType type) {
  if (type == at::kDouble) return at::kDouble;
#if SPECTRALX_X86_TARGETS
  static const bool bfloat16 = __builtin_cpu_supports("avx512bf16");
#else
  constexpr bool bfloat16 = true;
#endif
  return type == at::kBFloat16 && bfloat16 ? at::kBFloat16 : at::kFloat;
}

// x [m, k] times the transpose of weight [n, k]: [m, n].
inline at::Tensor product(const at::Tensor& x, const at::Tensor& weight) {
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            std::string_view, c10::List<std::optional<at::Scalar>>,
                            std::optional<std::string_view>);
  // oneDNN's product, which ATen's own float products do not reach. It has a fast kernel for
  // plainly laid out weights only.
  static const std::optional<c10::OperatorHandle> linear =
      c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (x.scalar_type() == at::kFloat && linear.has_value() && x.numel() > 0 &&
      weight.is_contiguous() &&
      at::globalContext().userEnabledMkldnn()) {
    return linear->typed<Linear>().call(x, weight, std::nullopt, "none",
                                        c10::List<std::optional<at::Scalar>>(), std::nullopt);
  }
  return at::mm(x, weight.t());
}

}  // namespace spectralx::cpu
