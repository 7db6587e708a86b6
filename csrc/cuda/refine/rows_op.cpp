// spectralx::gather_norm, gather_norm_mix and add_weighted_halves on CUDA, with their gradients. The
// products of the folded mixing are the vendor's.
#include <torch/library.h>

#include <optional>
#include <vector>

#include "cuda/common/glue.h"
#include "cuda/refine/kernels.h"

namespace {

using namespace spectralx::cuda;

// The tensors of a gather as the kernels read them.
struct Gather {
  SpectralxRows raw{};
  Tensor tokens, match, weight, bias;
  at::TensorOptions wide;

  Gather(const Tensor& tokens_, const Tensor& match_, const Tensor& norm_weight,
         const Tensor& norm_bias, double norm_eps) {
    TORCH_CHECK_VALUE(tokens_.dim() == 3 && match_.dim() == 2 && match_.size(0) == tokens_.size(0),
                      "tokens, match: got shapes ", tokens_.sizes(), ", ", match_.sizes(),
                      ", expected [batch, tokens, width] and [batch, keys]");
    const int64_t width = tokens_.size(2);
    TORCH_CHECK_VALUE(norm_weight.sizes() == at::IntArrayRef({width}) &&
                          norm_bias.sizes() == at::IntArrayRef({width}),
                      "norm_weight, norm_bias: got shapes ", norm_weight.sizes(), ", ",
                      norm_bias.sizes(), ", expected [", width, "]");
    tokens = width == 1 || tokens_.stride(2) == 1 ? tokens_ : tokens_.contiguous();
    match = match_.to(at::kLong).contiguous();
    weight = norm_weight.to(tokens.scalar_type()).contiguous();
    bias = norm_bias.to(tokens.scalar_type()).contiguous();
    wide = tokens.options().dtype(wide_type(tokens));
    raw.type = type_code(tokens);
    raw.batch = tokens.size(0), raw.count = tokens.size(1), raw.keys = match.size(1);
    raw.width = width, raw.eps = norm_eps;
    raw.by_image = tokens.stride(0), raw.by_row = tokens.stride(1);
    raw.tokens = pointer(tokens), raw.weight = pointer(weight), raw.bias = pointer(bias);
  }

  // [B, K, H] at match, or [B, N, H] of every token.
  Tensor normed(bool matched) const {
    SpectralxRows pass = raw;
    if (matched) pass.match = pointer(match);
    if (!matched) pass.keys = raw.count;
    const Tensor out = at::empty({raw.batch, pass.keys, raw.width}, tokens.options());
    pass.out = pointer(out);
    check_launch("gather_norm", spectralx_norm_rows(&pass, current_stream()));
    return out;
  }

  // [B, N, columns] of from [B or 1, K, columns], wide or in the type of the tokens.
  Tensor by_token(const Tensor& from, bool as_wide) const {
    const int64_t columns = from.size(2);
    const Tensor summed = at::empty({raw.batch, raw.count, columns},
                                    as_wide ? wide : tokens.options());
    check_launch("sum_by_token",
                 spectralx_sum_by_token(raw.type, pointer(from),
                                        from.size(0) == 1 ? 0 : from.stride(0), pointer(match),
                                        raw.batch, raw.count, raw.keys, columns, as_wide,
                                        pointer(summed), current_stream()));
    return summed;
  }

  // Of tokens (undefined if not wanted), weight and bias, from the gradient wide [B, N, H].
  std::vector<Tensor> gradients(const Tensor& grad, bool want_tokens) const {
    SpectralxRows pass = raw;
    const Tensor parts = at::empty({spectralx_norm_blocks(&pass), 2, raw.width}, wide);
    Tensor tokens_grad;
    if (want_tokens) {
      tokens_grad = at::empty({raw.batch, raw.count, raw.width}, tokens.options());
    }
    pass.grad = pointer(grad), pass.parts = pointer(parts);
    pass.tokens_grad = pointer(tokens_grad);
    check_launch("gather_norm_backward", spectralx_norm_rows_backward(&pass, current_stream()));
    return {tokens_grad, parts.select(1, 0).sum(0), parts.select(1, 1).sum(0)};
  }
};

OptionalTensor upstream(const c10::List<OptionalTensor>& output_grads,
                        const c10::List<bool>& output_mask, size_t inputs, at::IntArrayRef shape) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == inputs,
              "output_grads, output_mask: got ", output_grads.size(), " and ", output_mask.size(),
              " entries, expected 1 and ", inputs);
  const OptionalTensor grad = output_grads[0];
  TORCH_CHECK_VALUE(!grad.has_value() || grad->sizes() == shape, "output_grads: expected shape ",
                    shape);
  return grad;
}

// Those wanted, in the order and dtype of the inputs; zeros where nothing was computed.
std::vector<Tensor> wanted(const c10::List<bool>& mask, at::TensorList inputs,
                           at::TensorList computed, at::IntArrayRef places) {
  std::vector<Tensor> found;
  for (size_t i = 0; i < places.size(); ++i) {
    if (!mask[places[i]]) continue;
    found.push_back(computed.empty() ? at::zeros(inputs[i].sizes(), inputs[i].options())
                                     : computed[i].to(inputs[i].scalar_type()).contiguous());
  }
  return found;
}

Tensor gather_norm(const Tensor& tokens, const Tensor& match, const Tensor& norm_weight,
                   const Tensor& norm_bias, double norm_eps) {
  const c10::cuda::CUDAGuard guard(tokens.device());
  return Gather(tokens, match, norm_weight, norm_bias, norm_eps).normed(true);
}

std::vector<Tensor> gather_norm_backward(const c10::List<OptionalTensor>& output_grads,
                                         const Tensor& tokens, const Tensor& match,
                                         const Tensor& norm_weight, const Tensor& norm_bias,
                                         double norm_eps, at::TensorList /*saved*/,
                                         const c10::List<bool>& output_mask) {
  const c10::cuda::CUDAGuard guard(tokens.device());
  const Gather g(tokens, match, norm_weight, norm_bias, norm_eps);
  const std::vector<Tensor> inputs = {tokens, norm_weight, norm_bias};
  const OptionalTensor grad =
      upstream(output_grads, output_mask, 5, {g.raw.batch, g.raw.keys, g.raw.width});
  if (!grad.has_value()) return wanted(output_mask, inputs, {}, {0, 2, 3});
  const Tensor summed = g.by_token(grad->to(tokens.scalar_type()).contiguous(), true);
  return wanted(output_mask, inputs, g.gradients(summed, output_mask[0]), {0, 2, 3});
}

// The columns of mixing [T, K] added up by token: [B, N, T].
Tensor folded(const Gather& g, const Tensor& mixing) {
  TORCH_CHECK_VALUE(mixing.dim() == 2 && mixing.size(1) == g.raw.keys, "mixing: got shape ",
                    mixing.sizes(), ", expected [mixed, ", g.raw.keys, "]");
  return g.by_token(mixing.to(g.tokens.scalar_type()).t().contiguous().unsqueeze(0), false);
}

Tensor gather_norm_mix(const Tensor& tokens, const Tensor& match, const Tensor& norm_weight,
                       const Tensor& norm_bias, const Tensor& mixing, double norm_eps) {
  const c10::cuda::CUDAGuard guard(tokens.device());
  const Gather g(tokens, match, norm_weight, norm_bias, norm_eps);
  return at::bmm(folded(g, mixing).transpose(1, 2), g.normed(false)).contiguous();
}

std::vector<Tensor> gather_norm_mix_backward(const c10::List<OptionalTensor>& output_grads,
                                             const Tensor& tokens, const Tensor& match,
                                             const Tensor& norm_weight, const Tensor& norm_bias,
                                             const Tensor& mixing, double norm_eps,
                                             at::TensorList /*saved*/,
                                             const c10::List<bool>& output_mask) {
  const c10::cuda::CUDAGuard guard(tokens.device());
  const Gather g(tokens, match, norm_weight, norm_bias, norm_eps);
  const std::vector<Tensor> inputs = {tokens, norm_weight, norm_bias, mixing};
  const OptionalTensor given =
      upstream(output_grads, output_mask, 6, {g.raw.batch, mixing.size(0), g.raw.width});
  if (!given.has_value()) return wanted(output_mask, inputs, {}, {0, 2, 3, 4});
  const Tensor grad = given->to(tokens.scalar_type()).contiguous();
  std::vector<Tensor> found(3);
  if (output_mask[0] || output_mask[2] || output_mask[3]) {
    const Tensor summed = at::bmm(folded(g, mixing), grad);  // [B, N, H]
    found = g.gradients(summed.to(g.wide.dtype()).contiguous(), output_mask[0]);
  }
  found.emplace_back();
  if (output_mask[4]) {
    const Tensor by_token = at::bmm(g.normed(false), grad.transpose(1, 2)).contiguous();
    const Tensor columns = at::empty({g.raw.keys, mixing.size(0)}, g.wide);
    check_launch("gather_norm_mix_backward",
                 spectralx_sum_over_images(g.raw.type, pointer(by_token), pointer(g.match),
                                           g.raw.batch, g.raw.count, g.raw.keys, mixing.size(0),
                                           pointer(columns), current_stream()));
    found[3] = columns.t();
  }
  return wanted(output_mask, inputs, found, {0, 2, 3, 4});
}

// The tensors of a weighted sum as the kernels read them.
struct Weighted {
  SpectralxWeigh raw{};
  Tensor tokens, spatial, spectral, scale;

  Weighted(const Tensor& tokens_, const Tensor& spatial_weight, const Tensor& spectral_weight,
           const Tensor& scale_) {
    TORCH_CHECK_VALUE(tokens_.dim() == 3 && tokens_.size(2) % 2 == 0, "tokens: got shape ",
                      tokens_.sizes(), ", expected [batch, tokens, even width]");
    const auto shape = tokens_.sizes().slice(0, 2);
    TORCH_CHECK_VALUE(spatial_weight.sizes() == shape && spectral_weight.sizes() == shape,
                      "spatial_weight, spectral_weight: got shapes ", spatial_weight.sizes(), ", ",
                      spectral_weight.sizes(), ", expected ", shape);
    TORCH_CHECK_VALUE(scale_.numel() == 1, "scale: got shape ", scale_.sizes(),
                      ", expected a scalar");
    const auto type = tokens_.scalar_type();
    tokens = tokens_.contiguous();
    spatial = spatial_weight.to(type).contiguous();
    spectral = spectral_weight.to(type).contiguous();
    scale = scale_.to(type);
    raw.type = type_code(tokens);
    raw.tokens_count = tokens.size(0) * tokens.size(1), raw.half = tokens.size(2) / 2;
    raw.tokens = pointer(tokens), raw.spatial = pointer(spatial);
    raw.spectral = pointer(spectral), raw.scale = pointer(scale);
  }
};

Tensor add_weighted_halves(const Tensor& tokens, const Tensor& spatial_weight,
                           const Tensor& spectral_weight, const Tensor& scale) {
  const c10::cuda::CUDAGuard guard(tokens.device());
  Weighted w(tokens, spatial_weight, spectral_weight, scale);
  const Tensor out = at::empty(tokens.sizes(), tokens.options());
  w.raw.out = pointer(out);
  check_launch("add_weighted_halves", spectralx_weigh(&w.raw, current_stream()));
  return out;
}

std::vector<Tensor> add_weighted_halves_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& tokens,
    const Tensor& spatial_weight, const Tensor& spectral_weight, const Tensor& scale,
    at::TensorList /*saved*/, const c10::List<bool>& output_mask) {
  const c10::cuda::CUDAGuard guard(tokens.device());
  Weighted w(tokens, spatial_weight, spectral_weight, scale);
  const std::vector<Tensor> inputs = {tokens, spatial_weight, spectral_weight, scale};
  const OptionalTensor given = upstream(output_grads, output_mask, 4, tokens.sizes());
  if (!given.has_value() || tokens.numel() == 0) {
    return wanted(output_mask, inputs, {}, {0, 1, 2, 3});
  }
  const Tensor grad = given->to(tokens.scalar_type()).contiguous();
  const auto wide = tokens.options().dtype(wide_type(tokens));
  Tensor tokens_grad;
  if (output_mask[0]) tokens_grad = at::empty(tokens.sizes(), tokens.options());
  const Tensor spatial_grad = at::empty(spatial_weight.sizes(), tokens.options());
  const Tensor spectral_grad = at::empty(spatial_weight.sizes(), tokens.options());
  const Tensor parts = at::empty({w.raw.tokens_count, 2}, wide);
  w.raw.grad = pointer(grad), w.raw.tokens_grad = pointer(tokens_grad);
  w.raw.spatial_grad = pointer(spatial_grad), w.raw.spectral_grad = pointer(spectral_grad);
  w.raw.parts = pointer(parts);
  check_launch("add_weighted_halves_backward", spectralx_weigh_backward(&w.raw, current_stream()));
  const Tensor scale_grad = output_mask[3] ? parts.sum().view(scale.sizes()) : Tensor();
  return wanted(output_mask, inputs, {tokens_grad, spatial_grad, spectral_grad, scale_grad},
                {0, 1, 2, 3});
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("gather_norm", &gather_norm);
  m.impl("gather_norm_backward", &gather_norm_backward);
  m.impl("gather_norm_mix", &gather_norm_mix);
  m.impl("gather_norm_mix_backward", &gather_norm_mix_backward);
  m.impl("add_weighted_halves", &add_weighted_halves);
  m.impl("add_weighted_halves_backward", &add_weighted_halves_backward);
}
