// spectralx::noisy_topk_gating on CUDA.
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/common/glue.h"
#include "cuda/aomoa/kernels.h"

namespace {

using namespace spectralx::cuda;

void check(const Tensor& clean, const OptionalTensor& raw_std, const OptionalTensor& noise,
                  int64_t top_k) {
  TORCH_CHECK(clean.dim() == 3, "clean: got ", clean.dim(),
              " dimensions, expected [attributes, tokens, experts]");
  TORCH_CHECK(top_k >= 1 && top_k <= clean.size(2), "top_k: got ", top_k, ", expected 1 to ",
              clean.size(2));
  TORCH_CHECK(raw_std.has_value() == noise.has_value(),
              "noise and raw_std: got one of them, expected both or neither");
  for (const auto* tensor : {&raw_std, &noise}) {
    TORCH_CHECK(!tensor->has_value() || (*tensor)->sizes() == clean.sizes(),
                "raw_std, noise: expected the shape of clean, ", clean.sizes());
  }
}

std::tuple<Tensor, Tensor> noisy_topk_gating(const Tensor& clean, const OptionalTensor& raw_std,
                                             const OptionalTensor& noise, int64_t top_k) {
  check(clean, raw_std, noise, top_k);
  const c10::cuda::CUDAGuard guard(clean.device());
  const auto type = clean.scalar_type();
  const Tensor clean_ = clean.contiguous(), raw_std_ = prepared(raw_std, type),
               noise_ = prepared(noise, type);
  const int64_t attributes = clean.size(0), tokens = clean.size(1), experts = clean.size(2);
  const int64_t blocks = spectralx_gating_blocks(type_code(clean), tokens, experts);
  TORCH_CHECK(blocks > 0 || tokens == 0, "clean: got ", experts,
              " experts, expected fewer: a row has to fit in shared memory");
  const auto options = clean.options().dtype(wide_type(clean));
  Tensor gates = at::empty({attributes, tokens, experts}, options);
  Tensor load = at::empty({attributes, experts}, options);
  const Tensor partial = at::empty({attributes, blocks, experts}, options);
  if (attributes > 0) {
    check_launch("noisy_topk_gating",
                 spectralx_gating_forward(type_code(clean), pointer(clean_), pointer(raw_std_),
                                          pointer(noise_), attributes, tokens, experts, top_k,
                                          pointer(gates), pointer(load), pointer(partial),
                                          current_stream()));
  }
  return {gates, load};
}

std::vector<Tensor> noisy_topk_gating_backward(const c10::List<OptionalTensor>& output_grads,
                                               const Tensor& clean, const OptionalTensor& raw_std,
                                               const OptionalTensor& noise, int64_t top_k,
                                               at::TensorList /*saved*/,
                                               const c10::List<bool>& output_mask) {
  check(clean, raw_std, noise, top_k);
  TORCH_CHECK(output_grads.size() == 2, "output_grads: got ", output_grads.size(), ", expected 2");
  TORCH_CHECK(output_mask.size() == 4, "output_mask: got ", output_mask.size(), ", expected 4");
  const c10::cuda::CUDAGuard guard(clean.device());
  const auto type = clean.scalar_type(), wide = wide_type(clean);
  const Tensor clean_ = clean.contiguous(), raw_std_ = prepared(raw_std, type),
               noise_ = prepared(noise, type), gates_grad = prepared(output_grads[0], wide),
               load_grad = prepared(output_grads[1], wide);
  std::vector<Tensor> grads(3), wanted;
  for (int i = 0; i < 3; ++i) {
    if (!output_mask[i]) continue;
    grads[i] = at::empty_like(clean_);
    wanted.push_back(grads[i]);
  }
  if (clean.size(0) > 0) {
    check_launch(
        "noisy_topk_gating_backward",
        spectralx_gating_backward(type_code(clean), pointer(gates_grad), pointer(load_grad),
                                  pointer(clean_), pointer(raw_std_), pointer(noise_),
                                  clean.size(0), clean.size(1), clean.size(2), top_k,
                                  pointer(grads[0]), pointer(grads[1]), pointer(grads[2]),
                                  current_stream()));
  }
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("noisy_topk_gating", &noisy_topk_gating);
  m.impl("noisy_topk_gating_backward", &noisy_topk_gating_backward);
}
