// Matrix products of small operands, on the calling thread within `over_products`.
#pragma once

#include "cpu/common/linear.h"

namespace spectralx::cpu {

// x [m, k] times the transpose of weight [n, k]: [m, n].
inline at::Tensor product(const at::Tensor& x, const at::Tensor& weight) {
  // ATen's own bfloat16 products are oneDNN's.
  return x.scalar_type() == at::kFloat ? linear_layer(x, weight) : at::mm(x, weight.t());
}

}  // namespace spectralx::cpu
