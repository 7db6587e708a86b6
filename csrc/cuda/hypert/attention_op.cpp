// spectralx::window_attention and attribute_match on CUDA.
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cuda/common/glue.h"
#include "cuda/hypert/kernels.h"

namespace {

using namespace spectralx::cuda;

const void* from(const Tensor& tensor, int64_t element) {
  return static_cast<const char*>(tensor.const_data_ptr()) + element * tensor.element_size();
}

void* into(const Tensor& tensor, int64_t element) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + element * tensor.element_size();
}

// Log-sums and slopes of every row, and the parts of the padded position's gradient if there is one.
struct Workspace {
  Tensor rows, parts;

  Workspace(SpectralxAttention& a, const Tensor& like) {
    const auto wide = like.options().dtype(wide_type(like));
    const int64_t count = a.images * (a.queries > 0 ? a.queries : a.height * a.width);
    rows = at::empty({2, a.heads, count}, wide);
    a.log_sum = into(rows, 0), a.slope = into(rows, a.heads * count);
    if (a.padding_k == nullptr) return;
    const int64_t windows =
        (a.height + a.rows - 1) / a.rows * ((a.width + a.columns - 1) / a.columns);
    parts = at::empty({a.images * windows * spectralx_attention_tiles(&a), 2, a.heads * a.dim}, wide);
    a.parts = pointer(parts);
  }
};

// Of qkv and padding, both contiguous.
SpectralxAttention windows_of(const Tensor& qkv, const Tensor& padding, int64_t num_heads,
                              at::IntArrayRef window) {
  SpectralxAttention a{};
  const int64_t third = qkv.size(3) / 3;
  a.type = type_code(qkv);
  a.images = qkv.size(0), a.heads = num_heads, a.dim = third / num_heads;
  a.rows = window[0], a.columns = window[1], a.height = qkv.size(1), a.width = qkv.size(2);
  a.q_row = a.k_row = 3 * third;
  a.q_image = a.k_image = a.height * a.width * 3 * third;
  a.scale = 1 / std::sqrt(static_cast<double>(a.dim));
  a.q = from(qkv, 0), a.k = from(qkv, third), a.v = from(qkv, 2 * third);
  if (padding.defined() && (a.height % a.rows != 0 || a.width % a.columns != 0)) {
    a.padding_k = from(padding, third), a.padding_v = from(padding, 2 * third);
  }
  return a;
}

void check_windows(const Tensor& qkv, const OptionalTensor& padding, int64_t num_heads,
                   at::IntArrayRef window) {
  TORCH_CHECK_VALUE(qkv.dim() == 4 && qkv.size(3) > 0 && qkv.size(3) % 3 == 0, "qkv: got shape ",
                    qkv.sizes(), ", expected [batch, height, width, 3 * channels]");
  TORCH_CHECK_VALUE(num_heads > 0 && qkv.size(3) / 3 % num_heads == 0, "num_heads: got ",
                    num_heads, ", expected a divisor of ", qkv.size(3) / 3);
  TORCH_CHECK_VALUE(window.size() == 2 && window[0] > 0 && window[1] > 0, "window: got ", window,
                    ", expected two sizes of at least 1");
  const bool divides = qkv.size(1) % window[0] == 0 && qkv.size(2) % window[1] == 0;
  TORCH_CHECK_VALUE(divides || (padding.has_value() && padding->numel() == qkv.size(3)),
                    "padding: expected [", qkv.size(3), "]");
}

Tensor window_attention(const Tensor& qkv, const OptionalTensor& padding, int64_t num_heads,
                        at::IntArrayRef window) {
  check_windows(qkv, padding, num_heads, window);
  const c10::cuda::CUDAGuard guard(qkv.device());
  const Tensor rows = qkv.contiguous(), pad = prepared(padding, qkv.scalar_type());
  const Tensor out =
      at::empty({qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3) / 3}, qkv.options());
  SpectralxAttention a = windows_of(rows, pad, num_heads, window);
  a.out = pointer(out);
  check_launch("window_attention", spectralx_attention(&a, current_stream()));
  return out;
}

std::vector<Tensor> window_attention_backward(const c10::List<OptionalTensor>& output_grads,
                                              const Tensor& qkv, const OptionalTensor& padding,
                                              int64_t num_heads, at::IntArrayRef window,
                                              at::TensorList /*saved*/,
                                              const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 4,
              "output_grads, output_mask: expected 1 and 4 entries");
  check_windows(qkv, padding, num_heads, window);
  const c10::cuda::CUDAGuard guard(qkv.device());
  const OptionalTensor grad = output_grads[0];
  Tensor dqkv, dpadding;
  if (output_mask[1]) dpadding = at::zeros(padding->sizes(), padding->options());
  if (grad.has_value()) {
    const Tensor rows = qkv.contiguous(), pad = prepared(padding, qkv.scalar_type());
    const Tensor dout = grad->to(qkv.scalar_type()).contiguous();
    dqkv = at::empty(qkv.sizes(), qkv.options());
    const int64_t third = qkv.size(3) / 3;
    SpectralxAttention a = windows_of(rows, pad, num_heads, window);
    const Workspace workspace(a, qkv);
    a.dout = pointer(dout);
    a.dq = into(dqkv, 0), a.dq_row = 3 * third;
    a.dk = into(dqkv, third), a.dv = into(dqkv, 2 * third);
    check_launch("window_attention_backward", spectralx_attention_backward(&a, current_stream()));
    if (output_mask[1] && workspace.parts.defined()) {
      dpadding.narrow(0, third, 2 * third).copy_(workspace.parts.sum(0).flatten());
    }
  } else {
    dqkv = at::zeros(qkv.sizes(), qkv.options());
  }
  std::vector<Tensor> wanted;
  if (output_mask[0]) wanted.push_back(dqkv);
  if (output_mask[1]) wanted.push_back(dpadding);
  return wanted;
}

// The key projection folded into the queries: attention of [M, F] with normed features [B, N, F].
struct Match {
  Tensor features, normed, mean, rstd, key_weight, value_weight, folded;
  int64_t images, positions, width, count, inner;

  Match(const Tensor& x, const Tensor& queries, const Tensor& norm_weight, const Tensor& norm_bias,
        const Tensor& kv_weight, double norm_eps)
      : images(x.size(0)), positions(x.size(1)), width(x.size(2)), count(queries.size(0)),
        inner(queries.size(1)) {
    TORCH_CHECK_VALUE(kv_weight.sizes() == at::IntArrayRef({2 * inner, width}),
                      "kv_weight: got shape ", kv_weight.sizes(), ", expected [", 2 * inner, ", ",
                      width, "]");
    features = x.contiguous();
    std::tie(normed, mean, rstd) =
        at::native_layer_norm(features, {width}, norm_weight, norm_bias, norm_eps);
    key_weight = kv_weight.narrow(0, 0, inner), value_weight = kv_weight.narrow(0, inner, inner);
    folded = at::mm(queries, key_weight);
  }

  SpectralxAttention arguments() const {
    SpectralxAttention a{};
    a.type = type_code(normed);
    a.images = images, a.heads = 1, a.dim = width, a.queries = count;
    a.rows = 1, a.columns = positions, a.height = 1, a.width = positions;
    a.q_row = a.k_row = width, a.k_image = positions * width;
    a.scale = 1 / std::sqrt(static_cast<double>(inner));
    a.q = from(folded, 0), a.k = a.v = from(normed, 0);
    return a;
  }

  // Weighted sums of normed features [B M, F].
  Tensor found() const {
    const Tensor out = at::empty({images * count, width}, normed.options());
    if (count == 0) return out;
    SpectralxAttention a = arguments();
    a.out = pointer(out);
    check_launch("attribute_match", spectralx_attention(&a, current_stream()));
    return out;
  }
};

Tensor attribute_match(const Tensor& features, const Tensor& queries, const Tensor& norm_weight,
                       const Tensor& norm_bias, const Tensor& kv_weight, double norm_eps) {
  const c10::cuda::CUDAGuard guard(features.device());
  const Match m(features, queries, norm_weight, norm_bias, kv_weight, norm_eps);
  return at::mm(m.found(), m.value_weight.t()).view({m.images, m.count, m.inner});
}

std::vector<Tensor> attribute_match_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& features, const Tensor& queries,
    const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& kv_weight, double norm_eps,
    at::TensorList /*saved*/, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 6,
              "output_grads, output_mask: expected 1 and 6 entries");
  const c10::cuda::CUDAGuard guard(features.device());
  const Tensor inputs[] = {features, queries, norm_weight, norm_bias, kv_weight};
  const OptionalTensor grad = output_grads[0];
  std::vector<Tensor> wanted;
  if (!grad.has_value() || queries.size(0) == 0) {
    for (int64_t i = 0; i < 5; ++i)
      if (output_mask[i]) wanted.push_back(at::zeros(inputs[i].sizes(), inputs[i].options()));
    return wanted;
  }
  const Match m(features, queries, norm_weight, norm_bias, kv_weight, norm_eps);
  const auto type = features.scalar_type(), wide = wide_type(features);
  const Tensor dout = grad->to(type).reshape({m.images * m.count, m.inner});
  const Tensor dfound = at::mm(dout, m.value_weight);
  const Tensor dnormed = at::empty_like(m.normed);
  const Tensor dq = at::empty({m.images, m.count, m.width}, features.options().dtype(wide));
  SpectralxAttention a = m.arguments();
  const Workspace workspace(a, features);
  a.dout = pointer(dfound);
  a.dq = pointer(dq), a.dq_row = m.width, a.dq_wide = 1;
  a.dk = pointer(dnormed);
  check_launch("attribute_match_backward", spectralx_attention_backward(&a, current_stream()));
  auto [dfeatures, dweight, dbias] = at::native_layer_norm_backward(
      dnormed, m.features, {m.width}, m.mean, m.rstd, norm_weight, norm_bias,
      {output_mask[0], output_mask[2], output_mask[3]});
  const Tensor dfolded = dq.sum(0);
  if (output_mask[0]) wanted.push_back(dfeatures);
  if (output_mask[1]) wanted.push_back(at::mm(dfolded, m.key_weight.to(wide).t()).to(type));
  if (output_mask[2]) wanted.push_back(dweight);
  if (output_mask[3]) wanted.push_back(dbias);
  if (output_mask[4]) {
    wanted.push_back(at::cat({at::mm(queries.to(wide).t(), dfolded).to(type),
                              at::mm(dout.t(), m.found())}));
  }
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("window_attention", &window_attention);
  m.impl("window_attention_backward", &window_attention_backward);
  m.impl("attribute_match", &attribute_match);
  m.impl("attribute_match_backward", &attribute_match_backward);
}
