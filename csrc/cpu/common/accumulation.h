// The one place that says in which type the CPU kernels compute.
#pragma once

#include <c10/core/ScalarType.h>

namespace spectralx::cpu {

// float64 for float64, else float32: what sums, softmaxes and norms are formed in.
inline c10::ScalarType accumulation_type(c10::ScalarType type) {
  return type == c10::kDouble ? c10::kDouble : c10::kFloat;
}

}  // namespace spectralx::cpu
