// Launches of the layer's forward, and of what both passes prepare.
#include "cuda/aomoa/forward.cuh"

#include "cuda/aomoa/launch.h"
#include "cuda/aomoa/prepare.cuh"

namespace {

using namespace spectralx::cuda;

template <typename S>
MixtureSizes sizes_of(const SpectralxAomoa& layer) {
  return mixture_sizes(layer, [](const MixtureSizes& s) { return forward_shared<S>(s); });
}

}  // namespace

extern "C" {

int64_t spectralx_aomoa_forward_blocks(const SpectralxAomoa* layer) {
  return with_type(static_cast<int>(layer->type), [&](auto tag) {
    const MixtureSizes s = sizes_of<decltype(tag)>(*layer);
    return s.tile == 0 ? int64_t{0} : ceil_div(s.rows(), s.tile);
  });
}

int spectralx_aomoa_prepare(const SpectralxAomoa* layer, void* stream) {
  const SpectralxAomoa& l = *layer;
  return with_type(static_cast<int>(l.type), [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    const int64_t rows = l.statistics == nullptr ? 0 : l.tokens * l.attributes;
    PrepareSizes s{static_cast<int>(l.tokens),
                   static_cast<int>(l.attributes),
                   static_cast<int>(l.width),
                   static_cast<int>(l.rank),
                   static_cast<int>(l.out),
                   static_cast<int>(ceil_div(rows, kWarps)),
                   static_cast<int>(ceil_div(l.rank, kWarps)),
                   l.eps};
    const int64_t scale_blocks = ceil_div(l.attributes * l.out * l.rank, kScaleElements);
    return SPECTRALX_LAUNCH(
        (prepare<S>), static_cast<unsigned>(s.row_blocks + s.fold_blocks + scale_blocks), kThreads,
        0, static_cast<cudaStream_t>(stream), as<S>(l.x), as<S>(l.norm1_weight),
        as<S>(l.norm1_bias), as<S>(l.down), as<S>(l.up), as<S>(l.scaler), s, as<W>(l.statistics),
        as<S>(l.folded), as<W>(l.column_sums), as<W>(l.shift), as<S>(l.scaled_up),
        as<int>(l.counter));
  });
}

int spectralx_aomoa_forward(const SpectralxAomoa* layer, void* stream) {
  const SpectralxAomoa& l = *layer;
  return with_type(static_cast<int>(l.type), [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    const MixtureSizes s = sizes_of<S>(l);
    if (s.tile == 0) return kInvalidValue;
    const ForwardTensors<S> tensors{
        as<W>(l.products),   as<W>(l.column_sums), as<W>(l.shift), as<S>(l.norm2_weight),
        as<S>(l.norm2_bias), as<W>(l.statistics),  as<W>(l.normed), as<W>(l.gates),
        as<W>(l.load),       as<S>(l.mixed),       as<W>(l.load_partial), as<int>(l.counter)};
    return SPECTRALX_LAUNCH((mixture_forward<S>), static_cast<unsigned>(ceil_div(s.rows(), s.tile)),
                            kThreads, static_cast<size_t>(forward_shared<S>(s)),
                            static_cast<cudaStream_t>(stream), s, mixture_weights<S>(l), tensors,
                            l.eps);
  });
}
}
