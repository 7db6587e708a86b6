// Launches of the layer's backward.
#include "cuda/aomoa/backward.cuh"

#include <algorithm>

#include "cuda/aomoa/finish.cuh"
#include "cuda/aomoa/launch.h"

namespace {

using namespace spectralx::cuda;

template <typename S>
MixtureSizes sizes_of(const SpectralxAomoa& layer) {
  return mixture_sizes(layer, [](const MixtureSizes& s) { return backward_shared<S>(s); });
}

unsigned count(int64_t blocks) { return static_cast<unsigned>(blocks); }

}  // namespace

extern "C" {

int64_t spectralx_aomoa_backward_blocks(const SpectralxAomoa* layer) {
  return with_type(static_cast<int>(layer->type), [&](auto tag) {
    const MixtureSizes s = sizes_of<decltype(tag)>(*layer);
    return s.tile == 0 ? int64_t{0} : ceil_div(s.rows(), s.tile);
  });
}

// Enough blocks for four on each of 132 multiprocessors, each with rows enough to be worth it.
int64_t spectralx_aomoa_splits(const SpectralxAomoa* layer) {
  const int64_t blocks =
      ceil_div(layer->rank, kChunk) * (layer->experts + layer->attributes + 1);
  const int64_t most = ceil_div(layer->tokens * layer->attributes, 4 * kGradientRows);
  return std::max<int64_t>(1, std::min<int64_t>({ceil_div(528, blocks), most, 64}));
}

int64_t spectralx_aomoa_partial_size(const SpectralxAomoa* layer) {
  return PartLayout(static_cast<int>(layer->attributes), static_cast<int>(layer->rank),
                    static_cast<int>(layer->hidden), static_cast<int>(layer->experts))
      .size;
}

int spectralx_aomoa_backward(const SpectralxAomoa* layer, void* stream) {
  const SpectralxAomoa& l = *layer;
  return with_type(static_cast<int>(l.type), [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    const MixtureSizes s = sizes_of<S>(l);
    if (s.tile == 0) return kInvalidValue;
    const BackwardTensors<S> tensors{
        as<W>(l.normed),       as<W>(l.statistics),   as<W>(l.column_sums),  as<W>(l.shift),
        as<S>(l.norm2_weight), as<S>(l.norm2_bias),   as<S>(l.mixed_grad),   as<W>(l.gates_grad),
        as<W>(l.load_grad),    as<S>(l.mixed),        as<S>(l.normed_grad),  as<S>(l.hidden_rows),
        as<S>(l.hidden_grad),  as<S>(l.output_grad),  as<S>(l.router_grad),  as<W>(l.z_grad),
        as<W>(l.noise_grad),   as<W>(l.row_terms),    as<W>(l.norm_partial), as<short>(l.slots)};
    return SPECTRALX_LAUNCH((mixture_backward<S>), count(ceil_div(s.rows(), s.tile)), kThreads,
                            static_cast<size_t>(backward_shared<S>(s)),
                            static_cast<cudaStream_t>(stream), s, mixture_weights<S>(l), tensors,
                            static_cast<int>(l.width));
  });
}

int spectralx_aomoa_gradients(const SpectralxAomoa* layer, void* stream) {
  const SpectralxAomoa& l = *layer;
  return with_type(static_cast<int>(l.type), [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    const MixtureSizes s = sizes_of<S>(l);
    const GradientTensors<S> tensors{as<W>(l.normed),
                                     as<S>(l.norm2_weight),
                                     as<S>(l.norm2_bias),
                                     as<S>(l.hidden_rows),
                                     as<S>(l.hidden_grad),
                                     as<S>(l.output_grad),
                                     as<S>(l.router_grad),
                                     as<short>(l.slots),
                                     as<W>(l.norm_partial),
                                     static_cast<int>(l.row_blocks),
                                     as<W>(l.weight_partial)};
    const dim3 grid(count(ceil_div(l.rank, kChunk)), count(l.experts + l.attributes + 1),
                    count(l.splits));
    return SPECTRALX_LAUNCH((weight_gradients<S>), grid, kThreads,
                            static_cast<size_t>(gradient_shared<S>()),
                            static_cast<cudaStream_t>(stream), s, tensors);
  });
}

int spectralx_aomoa_finish(const SpectralxAomoa* layer, void* stream) {
  const SpectralxAomoa& l = *layer;
  return with_type(static_cast<int>(l.type), [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    const int64_t rows = l.tokens * l.attributes;
    const PartLayout parts(static_cast<int>(l.attributes), static_cast<int>(l.rank),
                           static_cast<int>(l.hidden), static_cast<int>(l.experts));
    const bool norm = l.norm1_weight_grad != nullptr || l.norm1_bias_grad != nullptr;
    const bool up = l.up_grad != nullptr || l.scaler_grad != nullptr;
    const int64_t x_packs = ceil_div(rows * l.width, Pack<S>::kSize);
    const FinishSizes s{
        rows,
        static_cast<int>(l.attributes),
        static_cast<int>(l.width),
        static_cast<int>(l.out),
        static_cast<int>(l.rank),
        static_cast<int>(l.hidden),
        static_cast<int>(l.experts),
        static_cast<int>(l.splits),
        static_cast<int>(l.x_grad == nullptr ? 0 : ceil_div(x_packs, kThreads)),
        static_cast<int>(
            l.weight_partial == nullptr ? 0 : ceil_div(parts.norms + 2 * l.rank, kThreads)),
        static_cast<int>(l.down_grad == nullptr ? 0 : ceil_div(l.rank, kWarps)),
        static_cast<int>(norm ? ceil_div(l.width, kNormColumns) : 0)};
    const int64_t up_blocks = up ? ceil_div(l.out, kWarps) : 0;
    const FinishTensors<S> tensors{
        as<S>(l.x),                 as<S>(l.scaler),          as<S>(l.norm1_weight),
        as<S>(l.norm1_bias),        as<S>(l.down),            as<S>(l.up),
        as<W>(l.row_terms),         as<W>(l.weight_partial),  as<W>(l.up_products),
        as<W>(l.down_products),     as<S>(l.x_grad),          as<S>(l.scaler_grad),
        as<S>(l.norm1_weight_grad), as<S>(l.norm1_bias_grad), as<S>(l.down_grad),
        as<S>(l.norm2_weight_grad), as<S>(l.norm2_bias_grad), as<S>(l.gate_grad),
        as<S>(l.gate_noise_grad),   as<S>(l.fc1_weight_grad), as<S>(l.fc1_bias_grad),
        as<S>(l.fc2_weight_grad),   as<S>(l.fc2_bias_grad),   as<S>(l.up_grad)};
    const int64_t blocks =
        s.x_blocks + s.part_blocks + s.down_blocks + s.norm_blocks + up_blocks;
    if (blocks == 0) return 0;
    return SPECTRALX_LAUNCH(
        (finish<S>), count(blocks), kThreads, 2 * kThreads * sizeof(W),
        static_cast<cudaStream_t>(stream), s, tensors);
  });
}
}
