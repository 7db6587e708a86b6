// Launches of noisy_topk_gating.
#include <algorithm>

#include "cuda/aomoa/gating.cuh"
#include "cuda/aomoa/kernels.h"
#include "cuda/common/dispatch.h"

namespace {

using namespace spectralx::cuda;

// Rows of a block: as many as fit, up to 128; 0 where one row is too large.
int64_t gating_threads(int64_t experts, int64_t bytes) {
  const int64_t row = kGatingTiles * row_stride(static_cast<int>(experts)) * bytes;
  const int64_t fits = kSharedBudget / 2 / row;
  if (fits >= 32) return std::min<int64_t>(128, fits / 32 * 32);
  return std::min<int64_t>(32, kSharedLimit / row);
}

}  // namespace

extern "C" {

int64_t spectralx_gating_blocks(int type, int64_t tokens, int64_t experts) {
  const int64_t threads = gating_threads(experts, type == kDouble ? 8 : 4);
  return threads > 0 ? ceil_div(tokens, threads) : 0;
}

int spectralx_gating_forward(int type, const void* clean, const void* raw_std, const void* noise,
                             int64_t attributes, int64_t tokens, int64_t experts, int64_t top_k,
                             void* gates, void* load, void* partial, void* stream) {
  return with_type(type, [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    const auto threads = static_cast<unsigned>(gating_threads(experts, sizeof(W)));
    if (threads == 0) return kInvalidValue;
    const auto blocks = static_cast<unsigned>(ceil_div(tokens, threads));
    const auto groups = static_cast<unsigned>(attributes);
    const GatingSizes sizes{static_cast<int>(attributes), static_cast<int>(tokens),
                            static_cast<int>(experts), static_cast<int>(top_k)};
    const auto on = static_cast<cudaStream_t>(stream);
    if (blocks > 0) {
      const size_t shared = sizeof(W) * threads * row_stride(sizes.experts) * 5;
      const int error = SPECTRALX_LAUNCH(
          (gating_forward<S>), dim3(blocks, groups), threads, shared, on,
          static_cast<const S*>(clean), static_cast<const S*>(raw_std),
          static_cast<const S*>(noise), sizes, static_cast<W*>(gates), static_cast<W*>(partial));
      if (error != 0) return error;
    }
    return SPECTRALX_LAUNCH((gating_load<W>), groups, 256, 256 * sizeof(W), on,
                            static_cast<const W*>(partial), static_cast<int>(blocks), sizes.experts,
                            static_cast<W*>(load));
  });
}

int spectralx_gating_backward(int type, const void* gates_grad, const void* load_grad,
                              const void* clean, const void* raw_std, const void* noise,
                              int64_t attributes, int64_t tokens, int64_t experts, int64_t top_k,
                              void* clean_grad, void* raw_std_grad, void* noise_grad,
                              void* stream) {
  return with_type(type, [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    const auto threads = static_cast<unsigned>(gating_threads(experts, sizeof(W)));
    if (threads == 0) return kInvalidValue;
    const auto blocks = static_cast<unsigned>(ceil_div(tokens, threads));
    if (blocks == 0) return 0;
    const GatingSizes sizes{static_cast<int>(attributes), static_cast<int>(tokens),
                            static_cast<int>(experts), static_cast<int>(top_k)};
    return SPECTRALX_LAUNCH(
        (gating_backward<S>), dim3(blocks, static_cast<unsigned>(attributes)), threads,
        sizeof(W) * threads * row_stride(sizes.experts) * kGatingTiles,
        static_cast<cudaStream_t>(stream), static_cast<const W*>(gates_grad),
        static_cast<const W*>(load_grad), static_cast<const S*>(clean),
        static_cast<const S*>(raw_std), static_cast<const S*>(noise), sizes,
        static_cast<S*>(clean_grad), static_cast<S*>(raw_std_grad), static_cast<S*>(noise_grad));
  });
}
}
