// spectralx::add_weighted_halves on the CPU, one pass over the tokens forward and one backward.
// Maths: spectralx_kernels/refine/README.md.
#include "cpu/torch.h"

#include <optional>
#include <vector>

#include "cpu/refine/kernels.h"
#include "cpu/refine/types.h"

namespace {

using at::Tensor;
using namespace spectralx::cpu;

constexpr int64_t kRows = 16;  // tokens of a task

// tokens [B, N, D] contiguous in the type of the kernels; weights [2][B N] and scale in double, which
// holds all their types.
struct Weighted {
  Tensor tokens, weights;
  double scale;
  int64_t rows, half;

  Weighted(const Tensor& tokens_, const Tensor& spatial, const Tensor& spectral,
           const Tensor& scale_) {
    TORCH_CHECK_VALUE(tokens_.dim() == 3 && tokens_.size(2) % 2 == 0, "tokens: got shape ",
                      tokens_.sizes(), ", expected [batch, tokens, even width]");
    const auto shape = tokens_.sizes().slice(0, 2);
    TORCH_CHECK_VALUE(spatial.sizes() == shape && spectral.sizes() == shape,
                      "spatial_weight, spectral_weight: got shapes ", spatial.sizes(), ", ",
                      spectral.sizes(), ", expected ", shape);
    TORCH_CHECK_VALUE(scale_.numel() == 1, "scale: got shape ", scale_.sizes(),
                      ", expected a scalar");
    tokens = tokens_.to(kernel_type(tokens_.scalar_type())).contiguous();
    weights = at::stack({spatial, spectral}).to(at::kDouble).contiguous();
    scale = scale_.item<double>();
    rows = tokens.size(0) * tokens.size(1), half = tokens.size(2) / 2;
  }

  double weight(int64_t side, int64_t row) const {
    return weights.const_data_ptr<double>()[side * rows + row];
  }
};

Tensor add_weighted_halves(const Tensor& tokens, const Tensor& spatial_weight,
                           const Tensor& spectral_weight, const Tensor& scale) {
  const Weighted w(tokens, spatial_weight, spectral_weight, scale);
  return with_kernel_type(w.tokens.scalar_type(), [&](auto tag) {
    using Op = decltype(tag);
    const auto& kernels = refine_kernels<Op>();
    const Tensor out = at::empty(tokens.sizes(), w.tokens.options());
    const Op* from = w.tokens.const_data_ptr<Op>();
    Op* to = out.mutable_data_ptr<Op>();
    at::parallel_for(0, w.rows, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = 2 * begin; i < 2 * end; ++i) {
        const auto factor = static_cast<Wide<Op>>(w.scale * w.weight(i % 2, i / 2));
        kernels.weigh(from + i * w.half, w.half, factor, to + i * w.half);
      }
    });
    return out.to(tokens.scalar_type());
  });
}

std::vector<Tensor> add_weighted_halves_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& tokens,
    const Tensor& spatial_weight, const Tensor& spectral_weight, const Tensor& scale,
    at::TensorList /*saved*/, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 4,
              "output_grads, output_mask: got ", output_grads.size(), " and ", output_mask.size(),
              " entries, expected 1 and 4");
  const Weighted w(tokens, spatial_weight, spectral_weight, scale);
  const std::optional<Tensor> upstream = output_grads[0];
  TORCH_CHECK_VALUE(!upstream.has_value() || upstream->sizes() == tokens.sizes(),
                    "output_grads: expected shape ", tokens.sizes());
  const Tensor grad = upstream.value_or(at::zeros(tokens.sizes(), tokens.options()))
                          .to(w.tokens.scalar_type())
                          .contiguous();
  const Tensor dots = at::empty(w.weights.sizes(), w.weights.options());  // of grad and tokens
  Tensor tokens_grad;
  if (output_mask[0]) tokens_grad = at::empty(tokens.sizes(), w.tokens.options());
  with_kernel_type(w.tokens.scalar_type(), [&](auto tag) {
    using Op = decltype(tag);
    const auto& kernels = refine_kernels<Op>();
    const Op *from = w.tokens.const_data_ptr<Op>(), *in = grad.const_data_ptr<Op>();
    Op* to = output_mask[0] ? tokens_grad.mutable_data_ptr<Op>() : nullptr;
    double* dot = dots.mutable_data_ptr<double>();
    at::parallel_for(0, w.rows, kRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = 2 * begin; i < 2 * end; ++i) {
        const auto factor = static_cast<Wide<Op>>(w.scale * w.weight(i % 2, i / 2));
        dot[i % 2 * w.rows + i / 2] =
            kernels.weigh_backward(from + i * w.half, in + i * w.half, w.half, factor,
                                   to ? to + i * w.half : nullptr);
      }
    });
  });
  double scale_grad = 0;  // in the order of the rows
  const double* dot = dots.const_data_ptr<double>();
  for (int64_t i = 0; i < 2 * w.rows; ++i) {
    scale_grad += dot[i] * w.weights.const_data_ptr<double>()[i];
  }
  std::vector<Tensor> wanted;
  const auto type = tokens.scalar_type();
  if (output_mask[0]) wanted.push_back(tokens_grad.to(type));
  for (int64_t side = 0; side < 2; ++side) {
    if (output_mask[1 + side]) wanted.push_back((dots[side] * w.scale).to(type));
  }
  if (output_mask[3]) wanted.push_back(at::full(scale.sizes(), scale_grad, scale.options()));
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("add_weighted_halves", &add_weighted_halves);
  m.impl("add_weighted_halves_backward", &add_weighted_halves_backward);
}
