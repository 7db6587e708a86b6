// Norms over the channels of a map, with what stands before and behind them; see channel_norm.cpp.
#pragma once

#include <optional>
#include <string_view>

#include "cpu/reconstruction/heads.h"
#include "cpu/upsample/maps.h"

namespace spectralx::cpu {

// after(norm(before(x))); without a weight there is no norm.
struct ChannelNorm {
  std::optional<at::Tensor> weight, bias;
  double eps;
  Activation before, after;

  ChannelNorm(const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
              double eps, std::string_view before, std::string_view after, const at::Tensor& x);

  // out = that + scale addend. All maps are channels last and in the type that is computed with.
  void apply(const at::Tensor& x, const std::optional<at::Tensor>& addend, double scale,
             const at::Tensor& out) const;

  // x_grad is filled if defined; sums [2, C] in double, of the gradients of weight and bias, added
  // to if defined. x_grad may be grad.
  void gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& x_grad,
                const at::Tensor& sums) const;
};

// What maps of this type are computed in: float16 in float32.
inline at::ScalarType map_type(at::ScalarType type) { return type == at::kHalf ? at::kFloat : type; }

// x in the type that is computed with, channels last.
at::Tensor as_map(const at::Tensor& x);

}  // namespace spectralx::cpu
