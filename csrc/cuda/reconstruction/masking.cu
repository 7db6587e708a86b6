// Launches of masking and moves of tokens.
#include "cuda/reconstruction/masking.cuh"

#include "cuda/common/dispatch.h"
#include "cuda/reconstruction/kernels.h"

using namespace spectralx::cuda;

extern "C" {

int spectralx_rank_tokens(int64_t type, const void* noise, int64_t batch, int64_t tokens,
                          int64_t keep, void* kept, void* masked, void* restore, void* stream) {
  const int64_t all = batch * tokens;
  if (all == 0) return 0;
  return with_type(static_cast<int>(type), [&](auto tag) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((rank_tokens<S>), blocks_of(all, kMoveWarps), kMoveThreads, 0,
                            static_cast<cudaStream_t>(stream), as<S>(noise), all,
                            static_cast<int>(tokens), static_cast<int>(keep), as<int64_t>(kept),
                            as<bool>(masked), as<int64_t>(restore));
  });
}

int spectralx_move_tokens(int64_t size, const void* tokens, const void* ids, const void* filler,
                          int64_t batch, int64_t kept, int64_t count, int64_t width, void* out,
                          void* stream) {
  const int64_t all = batch * count, bytes = width * size;
  if (all * width == 0) return 0;
  const auto moved = [&](auto unit) {
    using U = decltype(unit);
    return SPECTRALX_LAUNCH((move_tokens<U>), blocks_of(all, kMoveWarps), kMoveThreads, 0,
                            static_cast<cudaStream_t>(stream), as<U>(tokens), as<int64_t>(ids),
                            as<U>(filler), all, static_cast<int>(kept), static_cast<int>(count),
                            static_cast<int>(bytes / static_cast<int64_t>(sizeof(U))), as<U>(out));
  };
  if (bytes % 16 == 0 && on_16(tokens) && on_16(filler) && on_16(out)) return moved(uint4{});
  return size == 2 ? moved(uint16_t{}) : size == 4 ? moved(uint32_t{}) : moved(uint64_t{});
}

int spectralx_collect_tokens(int64_t type, const void* grad, const void* ids, int64_t batch,
                             int64_t kept, int64_t count, int64_t width, void* tokens, void* rest,
                             void* stream) {
  const int64_t rows = batch * (kept + (rest != nullptr ? 1 : 0));
  if (rows * width == 0) return 0;
  return with_type(static_cast<int>(type), [&](auto tag) {
    using S = decltype(tag);
    const dim3 grid(static_cast<unsigned>(rows), blocks_of(width, kColumnThreads));
    return SPECTRALX_LAUNCH((collect_tokens<S>), grid, kColumnThreads, 0,
                            static_cast<cudaStream_t>(stream), as<S>(grad), as<int64_t>(ids),
                            static_cast<int>(kept), static_cast<int>(count),
                            static_cast<int>(width), as<S>(tokens), as<Wide<S>>(rest));
  });
}
}
