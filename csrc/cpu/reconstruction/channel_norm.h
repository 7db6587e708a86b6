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

// Its parameters in the type of sums.
template <typename A>
struct NormParameters {
  at::Tensor weight, bias;
  RowNorm<A> norm;

  NormParameters(const ChannelNorm& given, int64_t channels) {
    norm = {nullptr, nullptr, static_cast<A>(given.eps), given.before, given.after, channels};
    if (!given.weight.has_value()) return;
    weight = given.weight->to(c10::CppTypeToScalarType<A>::value).contiguous();
    bias = given.bias->to(c10::CppTypeToScalarType<A>::value).contiguous();
    norm.weight = weight.const_data_ptr<A>();
    norm.bias = bias.const_data_ptr<A>();
  }
};

// What maps of this type are computed in: float16 in float32.
inline at::ScalarType map_type(at::ScalarType type) { return type == at::kHalf ? at::kFloat : type; }

// [pixels, channels] of a map.
inline at::Tensor rows_of_map(const at::Tensor& map) {
  return map.permute({0, 2, 3, 1}).reshape({-1, map.size(1)});
}

// x in the type that is computed with, channels last.
at::Tensor as_map(const at::Tensor& x);

}  // namespace spectralx::cpu
