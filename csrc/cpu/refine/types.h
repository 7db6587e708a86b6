// The storage types that the kernels of kernels.h exist for.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/common/product.h"

namespace spectralx::cpu {

// The storage type the kernels take tensors of `type` in.
inline at::ScalarType kernel_type(at::ScalarType type) {
  if (type == at::kDouble) return type;
  return type == at::kBFloat16 && multiplies_bfloat16() ? type : at::kFloat;
}

// run(a value of the storage type).
template <typename F>
auto with_kernel_type(at::ScalarType type, const F& run) {
  if (type == at::kDouble) return run(double());
  if (type == at::kBFloat16) return run(c10::BFloat16());
  return run(float());
}

}  // namespace spectralx::cpu
