// Launches of the match.
#include <algorithm>

#include "cuda/common/dispatch.h"
#include "cuda/refine/kernels.h"
#include "cuda/refine/match.cuh"

namespace {

using namespace spectralx::cuda;

constexpr int64_t kSplits = 8;  // of the keys, for more blocks than tiles of queries
constexpr int64_t kFew = 256;   // blocks below which tiles are kept small

MatchSizes sizes_of(const SpectralxMatch& p) {
  const int64_t steps = ceil_div(p.count, kChunk);
  const int64_t span = ceil_div(steps, std::min(kSplits, std::max<int64_t>(steps, 1))) * kChunk;
  return {static_cast<int>(p.rows),
          static_cast<int>(p.count),
          static_cast<int>(p.width),
          static_cast<int>(span > 0 ? ceil_div(p.count, span) : 0),
          static_cast<int>(span),
          16};
}

int tile_for(int64_t batch, int64_t rows, int64_t others) {
  return batch * ceil_div(rows, 32) * others >= kFew ? 32 : 16;
}

template <typename S>
int run(const SpectralxMatch& p, cudaStream_t on) {
  using W = Wide<S>;
  MatchSizes sizes = sizes_of(p);
  const auto *queries = static_cast<const S*>(p.queries), *keys = static_cast<const S*>(p.keys);
  auto *peaks = static_cast<W*>(p.peaks), *totals = static_cast<W*>(p.totals);
  sizes.tile = tile_for(p.batch, p.rows, sizes.splits);
  const dim3 grid(static_cast<unsigned>(p.batch * ceil_div(p.rows, sizes.tile)),
                  static_cast<unsigned>(sizes.splits));
  const int error = SPECTRALX_LAUNCH((match_sums<S>), grid, kThreads, match_shared<S>(sizes.tile),
                                     on, sizes, queries, keys, static_cast<W>(p.scale), peaks,
                                     totals);
  if (error != 0) return error;
  sizes.tile = tile_for(p.batch, p.count, 1);
  const auto blocks = static_cast<unsigned>(p.batch * ceil_div(p.count, sizes.tile));
  return SPECTRALX_LAUNCH((match_choose<S>), blocks, kThreads, match_shared<S>(sizes.tile), on,
                          sizes, queries, keys, static_cast<W>(p.scale),
                          static_cast<const W*>(peaks), static_cast<const W*>(totals),
                          static_cast<int64_t*>(p.match));
}

}  // namespace

extern "C" {

int64_t spectralx_match_splits(const SpectralxMatch* p) { return sizes_of(*p).splits; }

int spectralx_match(const SpectralxMatch* p, void* stream) {
  if (p->batch * p->count == 0) return 0;
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    return run<decltype(tag)>(*p, static_cast<cudaStream_t>(stream));
  });
}
}
