// Launches of the attention kernels.
#include "cuda/hypert/attention_backward.cuh"

#include <algorithm>

#include "cuda/common/dispatch.h"
#include "cuda/hypert/kernels.h"

namespace {

using namespace spectralx::cuda;

// Rows of a tile and columns of a block: as many as a warp's four tiles and shared memory allow.
AttentionSizes sizes_of(const SpectralxAttention& a) {
  AttentionSizes s{};
  s.heads = static_cast<int>(a.heads), s.dim = static_cast<int>(a.dim);
  s.queries = static_cast<int>(a.queries);
  s.rows = static_cast<int>(a.rows), s.columns = static_cast<int>(a.columns);
  s.height = static_cast<int>(a.height), s.width = static_cast<int>(a.width);
  s.q_image = a.q_image, s.q_row = a.q_row, s.k_image = a.k_image, s.k_row = a.k_row;
  s.all_rows = a.images * (a.queries > 0 ? a.queries : a.height * a.width);
  const bool narrow = a.type == kBFloat16 || a.type == kHalf;
  const int most = a.type == kDouble ? 64 : a.dim > 128 && narrow ? 256 : 128;
  s.tile = a.type == kDouble || a.dim > 128 ? 16 : 32;
  s.block = static_cast<int>(std::min<int64_t>(most, round_up(a.dim, 8)));
  return s;
}

template <typename S>
AttentionTensors<S> tensors_of(const SpectralxAttention& a) {
  using W = Wide<S>;
  const auto in = [](const void* pointer) { return static_cast<const S*>(pointer); };
  AttentionTensors<S> t{};
  t.q = in(a.q), t.k = in(a.k), t.v = in(a.v), t.dout = in(a.dout);
  t.padding_k = in(a.padding_k), t.padding_v = in(a.padding_v);
  t.out = static_cast<S*>(a.out), t.dk = static_cast<S*>(a.dk), t.dv = static_cast<S*>(a.dv);
  t.dq = a.dq, t.dq_row = a.dq_row, t.dq_wide = a.dq_wide != 0;
  t.log_sum = static_cast<W*>(a.log_sum), t.slope = static_cast<W*>(a.slope);
  t.parts = static_cast<W*>(a.parts);
  t.scale = static_cast<W>(a.scale);
  return t;
}

dim3 grid_of(const SpectralxAttention& a, const AttentionSizes& s, int rows) {
  return dim3(static_cast<unsigned>(a.images * s.windows() * s.heads),
              static_cast<unsigned>(ceil_div(rows, s.tile) * s.chunks()));
}

// Blocks of a grid's first and second dimension end here.
bool fits(const SpectralxAttention& a, const AttentionSizes& s) {
  return a.images * s.windows() * s.heads < (int64_t(1) << 31) &&
         ceil_div(std::max(s.count(), s.keys()), s.tile) * s.chunks() < 65536;
}

bool empty(const SpectralxAttention& a, const AttentionSizes& s) {
  return a.images * s.windows() == 0;
}

}  // namespace

extern "C" {

int64_t spectralx_attention_tiles(const SpectralxAttention* a) {
  const AttentionSizes s = sizes_of(*a);
  return ceil_div(s.count(), s.tile);
}

int spectralx_attention(const SpectralxAttention* a, void* stream) {
  const AttentionSizes s = sizes_of(*a);
  if (empty(*a, s)) return 0;
  if (!fits(*a, s)) return kInvalidValue;
  return with_type(static_cast<int>(a->type), [&](auto tag) {
    using S = decltype(tag);
    const auto shared = static_cast<size_t>(AttentionLayout<S>(s.tile, s.block).bytes());
    return SPECTRALX_LAUNCH((attention_forward<S>), grid_of(*a, s, s.count()), kThreads, shared,
                            static_cast<cudaStream_t>(stream), s, tensors_of<S>(*a));
  });
}

int spectralx_attention_backward(const SpectralxAttention* a, void* stream) {
  const AttentionSizes s = sizes_of(*a);
  if (empty(*a, s)) return 0;
  if (!fits(*a, s)) return kInvalidValue;
  return with_type(static_cast<int>(a->type), [&](auto tag) {
    using S = decltype(tag);
    const auto shared = static_cast<size_t>(AttentionLayout<S>(s.tile, s.block).bytes());
    const auto on = static_cast<cudaStream_t>(stream);
    const AttentionTensors<S> t = tensors_of<S>(*a);
    const int error = SPECTRALX_LAUNCH((attention_queries_backward<S>), grid_of(*a, s, s.count()),
                                       kThreads, shared, on, s, t);
    if (error != 0) return error;
    return SPECTRALX_LAUNCH((attention_keys_backward<S>), grid_of(*a, s, s.keys()), kThreads,
                            shared, on, s, t);
  });
}
}
