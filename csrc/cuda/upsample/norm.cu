// Launches of statistics, batch norm and ReLU.
#include "cuda/upsample/norm.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/common/dispatch.h"
#include "cuda/upsample/kernels.h"

namespace {

using namespace spectralx::cuda;

// Packs of a block: the power of two up to a warp that they fill.
int packs_of(int64_t packs) {
  int width = 1;
  while (width < 32 && width < packs) width *= 2;
  return width;
}

// Calls run(S, N, packs of a block, grid) for `blocks` runs of rows, where pointers and channels allow
// N values at once.
template <typename Run>
int over_rows(int64_t type, int64_t channels, int64_t blocks, bool aligned, const Run& run) {
  return with_type(static_cast<int>(type), [&](auto tag) {
    constexpr int kSize = Pack<decltype(tag)>::kSize;
    const auto with = [&](auto n) {
      const int64_t all = ceil_div(channels, int64_t(n.value));
      const int packs = packs_of(all);
      return run(tag, n, packs, dim3(static_cast<unsigned>(blocks), blocks_of(all, packs)));
    };
    return channels % kSize == 0 && aligned ? with(std::integral_constant<int, kSize>())
                                            : with(std::integral_constant<int, 1>());
  });
}

template <typename W>
int joined(MomentParts<W> parts, int64_t count, int channels, W* moments, cudaStream_t on) {
  const auto blocks = static_cast<unsigned>(ceil_div(channels, kTile));
  const int64_t groups = spectralx_moment_groups(count);
  if (groups > 0) {
    const MomentParts<W> fewer{parts.values + count * 2 * channels, parts.counts + count};
    const int error =
        SPECTRALX_LAUNCH((join_moments<W, false>), dim3(blocks, static_cast<unsigned>(groups)),
                         kTile, 0, on, parts, count, int64_t(kJoined), channels, fewer);
    if (error != 0) return error;
    parts = fewer, count = groups;
  }
  return SPECTRALX_LAUNCH((join_moments<W, true>), dim3(blocks, 1), kTile, 0, on, parts, count,
                          count, channels, MomentParts<W>{moments, nullptr});
}

template <typename S>
NormPass<S> pass_of(const SpectralxNorm& p, int packs) {
  using W = Wide<S>;
  return {p.rows,
          static_cast<int>(p.channels),
          packs,
          p.relu != 0,
          static_cast<W>(p.eps),
          as<S>(p.x),
          as<S>(p.grad),
          as<W>(p.moments),
          as<W>(p.weight),
          as<W>(p.bias),
          as<W>(p.totals),
          as<S>(p.out)};
}

bool aligned(const SpectralxNorm& p) { return on_16(p.x) && on_16(p.grad) && on_16(p.out); }

// A pass that keeps nothing: `launched(S, N, packs, grid)`.
template <typename Run>
int pass_over(const SpectralxNorm& p, const Run& launched) {
  if (p.rows == 0) return 0;
  return over_rows(p.type, p.channels, ceil_div(p.rows, int64_t(kNormRows)), aligned(p), launched);
}

}  // namespace

extern "C" {

int64_t spectralx_moment_groups(int64_t count) {
  return count > 2 * kJoined ? ceil_div(count, int64_t(kJoined)) : 0;
}

int64_t spectralx_moment_parts(int64_t rows) {
  return std::min<int64_t>(ceil_div(rows, 64), 256);
}

int spectralx_join_moments(int64_t type, void* parts, void* counts, int64_t count, int64_t channels,
                           void* moments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return with_type(static_cast<int>(type), [&](auto tag) {
    using W = Wide<decltype(tag)>;
    return joined<W>({as<W>(parts), as<W>(counts)}, count, static_cast<int>(channels),
                     as<W>(moments), on);
  });
}

int spectralx_channel_moments(int64_t type, const void* x, int64_t rows, int64_t channels,
                              void* parts, void* counts, void* moments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t count = spectralx_moment_parts(rows);
  return over_rows(type, channels, count, on_16(x), [&](auto tag, auto n, int packs, dim3 grid) {
    using S = decltype(tag);
    using W = Wide<S>;
    constexpr int N = decltype(n)::value;
    const MomentParts<W> by{as<W>(parts), as<W>(counts)};
    if (count > 0) {
      const int error = SPECTRALX_LAUNCH((moment_parts<S, N>), grid, kTile,
                                         2 * kTile * N * sizeof(W), on, as<S>(x), rows,
                                         ceil_div(rows, count), static_cast<int>(channels), packs,
                                         by);
      if (error != 0) return error;
    }
    return joined<W>(by, count, static_cast<int>(channels), as<W>(moments), on);
  });
}

int spectralx_normalize(const SpectralxNorm* p, void* stream) {
  return pass_over(*p, [&](auto tag, auto n, int packs, dim3 grid) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((normalize<S, decltype(n)::value>), grid, kTile, 0,
                            static_cast<cudaStream_t>(stream), pass_of<S>(*p, packs));
  });
}

int spectralx_norm_sums(const SpectralxNorm* p, void* parts, void* sums, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t count = spectralx_moment_parts(p->rows);
  const auto run = [&](auto tag, auto n, int packs, dim3 grid) {
    using S = decltype(tag);
    using W = Wide<S>;
    constexpr int N = decltype(n)::value;
    if (count > 0) {
      const int error = SPECTRALX_LAUNCH((norm_parts<S, N>), grid, kTile,
                                         2 * kTile * N * sizeof(W), on, pass_of<S>(*p, packs),
                                         ceil_div(p->rows, count), as<W>(parts));
      if (error != 0) return error;
    }
    const int width = static_cast<int>(2 * p->channels);
    return SPECTRALX_LAUNCH((channel_total<W>), blocks_of(width, kTile), kTile, 0, on,
                            static_cast<const W*>(parts), static_cast<int>(count), width, as<W>(sums));
  };
  return over_rows(p->type, p->channels, count, aligned(*p), run);
}

int spectralx_norm_gradient(const SpectralxNorm* p, void* stream) {
  return pass_over(*p, [&](auto tag, auto n, int packs, dim3 grid) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((norm_gradient<S, decltype(n)::value>), grid, kTile, 0,
                            static_cast<cudaStream_t>(stream), pass_of<S>(*p, packs));
  });
}
}
