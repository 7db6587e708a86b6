// Noisy top-k gating on the CPU, for the operator of that name and for the whole layer.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "cpu/common/accumulation.h"

namespace spectralx::cpu {

// clean, raw_std, noise [A, T, E], the latter two both or neither; gates [A, T, E] and load [A, E]
// in the accumulation type.
std::tuple<at::Tensor, at::Tensor> noisy_topk_gating(const at::Tensor& clean,
                                                     const std::optional<at::Tensor>& raw_std,
                                                     const std::optional<at::Tensor>& noise,
                                                     int64_t top_k);

struct GatingGradients {
  at::Tensor clean, raw_std, noise;  // undefined where not wanted
};

// Gradients in the accumulation type; either incoming gradient may be missing.
GatingGradients noisy_topk_gating_gradients(const std::optional<at::Tensor>& gates_grad,
                                            const std::optional<at::Tensor>& load_grad,
                                            const at::Tensor& clean,
                                            const std::optional<at::Tensor>& raw_std,
                                            const std::optional<at::Tensor>& noise, int64_t top_k,
                                            bool want_raw_std, bool want_noise);

}  // namespace spectralx::cpu
