// spectralx::random_masking, gather_tokens and restore_tokens on CUDA. Indices are not looked at: that
// would stall the GPU.
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/reconstruction.h"
#include "cuda/common/glue.h"
#include "cuda/reconstruction/kernels.h"

namespace {

using namespace spectralx::cuda;
using spectralx::reconstruction::Grads;
using spectralx::reconstruction::upstream_of;
using spectralx::reconstruction::Wanted;

std::tuple<Tensor, Tensor, Tensor> random_masking(const Tensor& noise_, int64_t keep) {
  TORCH_CHECK_VALUE(noise_.dim() == 2, "noise: got shape ", noise_.sizes(),
                    ", expected [batch, tokens]");
  const c10::cuda::CUDAGuard guard(noise_.device());
  const Tensor noise = noise_.contiguous();
  const int64_t batch = noise.size(0), tokens = noise.size(1);
  TORCH_CHECK_VALUE(keep >= 0 && keep <= tokens, "keep: got ", keep, ", expected 0 to ", tokens);
  const Tensor restore = at::empty({batch, tokens}, noise.options().dtype(at::kLong));
  const Tensor kept = at::empty({batch, keep}, restore.options());
  const Tensor mask = at::empty({batch, tokens}, restore.options().dtype(at::kBool));
  check_launch("random_masking",
               spectralx_rank_tokens(type_code(noise), pointer(noise), batch, tokens, keep,
                                     pointer(kept), pointer(mask), pointer(restore),
                                     current_stream()));
  return {kept, mask, restore};
}

void check_ids(const char* name, const Tensor& ids, const Tensor& tokens) {
  TORCH_CHECK_VALUE(tokens.dim() == 3 && ids.dim() == 2 && ids.size(0) == tokens.size(0) &&
                        ids.scalar_type() == at::kLong,
                    name, ": got shape ", ids.sizes(), " of ", ids.scalar_type(),
                    ", expected [batch, n] of int64, batch as in tokens, ", tokens.sizes());
}

// Rows of tokens [B, kept, width] at ids [B, n]; others are `filler`, or 0.
Tensor moved(const char* name, const Tensor& tokens, const Tensor& ids, const Tensor& filler) {
  const Tensor from = tokens.contiguous(), index = ids.contiguous();
  const Tensor out = at::empty({from.size(0), index.size(1), from.size(2)}, from.options());
  check_launch(name, spectralx_move_tokens(from.element_size(), pointer(from), pointer(index),
                                           pointer(filler), from.size(0), from.size(1),
                                           index.size(1), from.size(2), pointer(out),
                                           current_stream()));
  return out;
}

// The gradient of the tokens and, if `rest`, of the filler for each image, wide [B, width].
std::tuple<Tensor, Tensor> collected(const char* name, const Tensor& upstream, const Tensor& tokens,
                                     const Tensor& ids, bool rest) {
  const int64_t batch = tokens.size(0), kept = tokens.size(1), width = tokens.size(2);
  const auto wide = tokens.options().dtype(wide_type(tokens));
  if (!upstream.defined()) {
    return {at::zeros(tokens.sizes(), tokens.options()), at::zeros({batch, width}, wide)};
  }
  TORCH_CHECK_VALUE(upstream.sizes() == at::IntArrayRef({batch, ids.size(1), width}),
                    "output_grads: got shape ", upstream.sizes());
  const Tensor grad = upstream.to(tokens.scalar_type()).contiguous(), index = ids.contiguous();
  const Tensor out = at::empty(tokens.sizes(), tokens.options());
  const Tensor over = rest ? at::empty({batch, width}, wide) : Tensor();
  check_launch(name, spectralx_collect_tokens(type_code(tokens), pointer(grad), pointer(index),
                                              batch, kept, ids.size(1), width, pointer(out),
                                              pointer(over), current_stream()));
  return {out, over};
}

Tensor gather_tokens(const Tensor& tokens, const Tensor& ids) {
  check_ids("ids", ids, tokens);
  const c10::cuda::CUDAGuard guard(tokens.device());
  return moved("gather_tokens", tokens, ids, Tensor());
}

std::vector<Tensor> gather_tokens_backward(const Grads& output_grads, const Tensor& tokens,
                                           const Tensor& ids, at::TensorList /*saved*/,
                                           const Wanted& wanted) {
  if (!wanted[0]) return {};
  check_ids("ids", ids, tokens);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const char* name = "gather_tokens_backward";
  return {std::get<0>(collected(name, upstream_of(output_grads), tokens, ids, false))};
}

Tensor restore_tokens(const Tensor& tokens, const Tensor& ids_restore, const Tensor& mask_token) {
  check_ids("ids_restore", ids_restore, tokens);
  TORCH_CHECK_VALUE(mask_token.numel() == tokens.size(2), "mask_token: got shape ",
                    mask_token.sizes(), ", expected [", tokens.size(2), "]");
  const c10::cuda::CUDAGuard guard(tokens.device());
  return moved("restore_tokens", tokens, ids_restore,
               mask_token.to(tokens.scalar_type()).contiguous());
}

std::vector<Tensor> restore_tokens_backward(const Grads& output_grads, const Tensor& tokens,
                                            const Tensor& ids_restore, const Tensor& mask_token,
                                            at::TensorList /*saved*/, const Wanted& wanted) {
  check_ids("ids_restore", ids_restore, tokens);
  const c10::cuda::CUDAGuard guard(tokens.device());
  const auto [out, rest] = collected("restore_tokens_backward", upstream_of(output_grads), tokens,
                                     ids_restore, wanted[2]);
  std::vector<Tensor> grads;
  if (wanted[0]) grads.push_back(out);
  if (wanted[2]) {
    grads.push_back(rest.sum(0).reshape(mask_token.sizes()).to(mask_token.scalar_type()));
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("random_masking", &random_masking);
  m.impl("gather_tokens", &gather_tokens);
  m.impl("gather_tokens_backward", &gather_tokens_backward);
  m.impl("restore_tokens", &restore_tokens);
  m.impl("restore_tokens_backward", &restore_tokens_backward);
}
