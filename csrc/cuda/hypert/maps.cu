// Launches of the stem's own passes.
#include "cuda/hypert/maps.cuh"

#include "cuda/common/dispatch.h"
#include "cuda/hypert/kernels.h"

using namespace spectralx::cuda;

extern "C" {

int spectralx_norm_table(int64_t type, const void* weight, const void* bias, int64_t channels,
                         double eps, void* table, void* stream) {
  if (channels == 0) return 0;
  return with_type(static_cast<int>(type), [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    return SPECTRALX_LAUNCH((norm_table<S>),
                            static_cast<unsigned>(ceil_div(channels, int64_t(kTile))), kTile, 0,
                            static_cast<cudaStream_t>(stream), as<S>(weight), as<S>(bias),
                            static_cast<int>(channels), static_cast<W>(eps), as<W>(table));
  });
}

int spectralx_with_ones(int64_t type, const void* images, int64_t batch, int64_t pixels,
                        int64_t bands, int64_t channels, void* out, void* stream) {
  if (batch * pixels == 0) return 0;
  if (batch > 65535) return kInvalidValue;
  return with_type(static_cast<int>(type), [&](auto tag) {
    using S = decltype(tag);
    const dim3 grid(static_cast<unsigned>(ceil_div(pixels, int64_t(kOnesPixels))),
                    static_cast<unsigned>(batch));
    return SPECTRALX_LAUNCH((with_ones<S>), grid, kTile,
                            kOnesChannels * (kOnesPixels + 1) * sizeof(S),
                            static_cast<cudaStream_t>(stream), as<S>(images), pixels,
                            static_cast<int>(bands), static_cast<int>(channels), as<S>(out));
  });
}
}
