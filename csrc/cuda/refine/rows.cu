// Launches of the gathers of normed rows and of the weighted halves.
#include "cuda/common/dispatch.h"
#include "cuda/refine/kernels.h"
#include "cuda/refine/rows.cuh"

namespace {

using namespace spectralx::cuda;

template <typename S>
NormedRows<S> rows_of(const SpectralxRows& p) {
  constexpr int64_t kSize = Pack<S>::kSize;
  return {as<S>(p.tokens),
          as<S>(p.weight),
          as<S>(p.bias),
          p.by_image,
          p.by_row,
          static_cast<int>(p.count),
          static_cast<int>(p.width),
          static_cast<Wide<S>>(p.eps),
          on_16(p.tokens) && p.by_image % kSize == 0 && p.by_row % kSize == 0 &&
              p.width % kSize == 0};
}

template <typename S>
Halves<S> halves_of(const SpectralxWeigh& p) {
  const bool aligned = on_16(p.tokens) && on_16(p.grad);
  return {as<S>(p.tokens), as<S>(p.spatial),    as<S>(p.spectral),
          as<S>(p.scale),  2 * p.tokens_count,  static_cast<int>(p.half),
          aligned && p.half % Pack<S>::kSize == 0};
}

}  // namespace

extern "C" {

int spectralx_norm_rows(const SpectralxRows* p, void* stream) {
  const int64_t total = p->batch * p->keys;
  if (total * p->width == 0) return 0;
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((norm_rows<S>), blocks_of(total, kRowWarps), kRowThreads, 0,
                            static_cast<cudaStream_t>(stream), rows_of<S>(*p),
                            as<int64_t>(p->match), total, static_cast<int>(p->keys), as<S>(p->out));
  });
}

int64_t spectralx_norm_blocks(const SpectralxRows* p) {
  return ceil_div(p->batch * p->count, kNormRows);
}

int spectralx_norm_rows_backward(const SpectralxRows* p, void* stream) {
  const int64_t total = p->batch * p->count;
  if (total * p->width == 0) return 0;
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    return SPECTRALX_LAUNCH((norm_rows_backward<S>), blocks_of(total, kNormRows), kRowThreads,
                            kNormRows * sizeof(Moments<W>), static_cast<cudaStream_t>(stream),
                            rows_of<S>(*p), as<W>(p->grad), total, as<S>(p->tokens_grad),
                            as<W>(p->parts));
  });
}

int spectralx_sum_by_token(int64_t type, const void* from, int64_t by_image, const void* match,
                           int64_t batch, int64_t count, int64_t keys, int64_t columns,
                           int64_t wide, void* summed, void* stream) {
  if (batch * count * columns == 0) return 0;
  const auto on = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(batch * count), blocks_of(columns, kColumnThreads));
  return with_type(static_cast<int>(type), [&](auto tag) {
    using S = decltype(tag);
    const auto launched = [&](auto out) {
      using O = decltype(out);
      return SPECTRALX_LAUNCH((sum_by_token<S, O>), grid, kColumnThreads, 0, on, as<S>(from),
                              by_image, as<int64_t>(match), static_cast<int>(count),
                              static_cast<int>(keys), static_cast<int>(columns), as<O>(summed));
    };
    return wide != 0 ? launched(Wide<S>{}) : launched(S{});
  });
}

int spectralx_sum_over_images(int64_t type, const void* from, const void* match, int64_t batch,
                              int64_t count, int64_t keys, int64_t width, void* columns,
                              void* stream) {
  if (keys * width == 0) return 0;
  const dim3 grid(static_cast<unsigned>(keys), blocks_of(width, kColumnThreads));
  return with_type(static_cast<int>(type), [&](auto tag) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((sum_over_images<S>), grid, kColumnThreads, 0,
                            static_cast<cudaStream_t>(stream), as<S>(from), as<int64_t>(match),
                            static_cast<int>(batch), static_cast<int>(count),
                            static_cast<int>(keys), static_cast<int>(width), as<Wide<S>>(columns));
  });
}

int spectralx_weigh(const SpectralxWeigh* p, void* stream) {
  if (p->tokens_count * p->half == 0) return 0;
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((weigh<S>), blocks_of(2 * p->tokens_count, kRowWarps), kRowThreads, 0,
                            static_cast<cudaStream_t>(stream), halves_of<S>(*p), as<S>(p->out));
  });
}

int spectralx_weigh_backward(const SpectralxWeigh* p, void* stream) {
  if (p->tokens_count * p->half == 0) return 0;
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((weigh_backward<S>), blocks_of(2 * p->tokens_count, kRowWarps),
                            kRowThreads, 0, static_cast<cudaStream_t>(stream), halves_of<S>(*p),
                            as<S>(p->grad), as<S>(p->tokens_grad), as<S>(p->spatial_grad),
                            as<S>(p->spectral_grad), as<Wide<S>>(p->parts));
  });
}
}
