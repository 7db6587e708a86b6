// Launches of statistics and batch norm.
#include "cuda/common/norm.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/common/dispatch.h"
#include "cuda/common/norm.h"

namespace {

using namespace spectralx::cuda;

// Packs of a block: the power of two up to a warp that they fill.
int packs_of(int64_t packs) {
  int width = 1;
  while (width < 32 && width < packs) width *= 2;
  return width;
}

dim3 grid_of(int64_t channels, int64_t n, int packs, int64_t blocks) {
  return dim3(static_cast<unsigned>(blocks),
              static_cast<unsigned>(ceil_div(ceil_div(channels, n), packs)));
}

// Calls run(S, N) where pointers and channels allow N at once.
template <typename Run>
int with_packs(int64_t type, int64_t channels, bool aligned, const Run& run) {
  return with_type(static_cast<int>(type), [&](auto tag) {
    using S = decltype(tag);
    constexpr int kSize = Pack<S>::kSize;
    return channels % kSize == 0 && aligned ? run(tag, std::integral_constant<int, kSize>())
                                            : run(tag, std::integral_constant<int, 1>());
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
          p.activation != 0,
          static_cast<W>(p.eps),
          static_cast<const S*>(p.x),
          static_cast<const S*>(p.grad),
          static_cast<const S*>(p.skip),
          static_cast<const W*>(p.moments),
          static_cast<const W*>(p.weight),
          static_cast<const W*>(p.scale),
          static_cast<const W*>(p.bias),
          static_cast<const W*>(p.totals),
          static_cast<S*>(p.out)};
}

// Calls run(Activation, S, N).
template <typename Run>
int with_pass(const SpectralxNorm& p, const Run& run) {
  const bool aligned = on_16(p.x) && on_16(p.grad) && on_16(p.skip) && on_16(p.out);
  return with_packs(p.type, p.channels, aligned, [&](auto tag, auto n) {
    return p.activation == 2 ? run(Gelu(), tag, n) : run(Relu(), tag, n);
  });
}

// A pass that keeps nothing: launched(Activation, S, N, packs of a block, grid).
template <typename Run>
int pass_over(const SpectralxNorm& p, const Run& launched) {
  if (p.rows == 0) return 0;
  return with_pass(p, [&](auto activation, auto tag, auto n) {
    const int packs = packs_of(ceil_div(p.channels, n.value));
    return launched(activation, tag, n, packs,
                    grid_of(p.channels, n.value, packs, ceil_div(p.rows, int64_t(kNormRows))));
  });
}

}  // namespace

extern "C" {

int64_t spectralx_moment_groups(int64_t count) {
  return count > 2 * kJoined ? ceil_div(count, int64_t(kJoined)) : 0;
}

int64_t spectralx_moment_parts(int64_t rows) {
  return std::min<int64_t>(ceil_div(rows, 64), 1024);
}

int spectralx_join_moments(int64_t type, void* parts, void* counts, int64_t count, int64_t channels,
                           void* moments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return with_type(static_cast<int>(type), [&](auto tag) {
    using W = Wide<decltype(tag)>;
    return joined<W>({static_cast<W*>(parts), static_cast<W*>(counts)}, count,
                     static_cast<int>(channels), static_cast<W*>(moments), on);
  });
}

int spectralx_channel_moments(int64_t type, const void* x, int64_t rows, int64_t channels,
                              void* parts, void* counts, void* moments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t count = spectralx_moment_parts(rows);
  return with_packs(type, channels, on_16(x), [&](auto tag, auto n) {
    using S = decltype(tag);
    using W = Wide<S>;
    constexpr int N = decltype(n)::value;
    const MomentParts<W> by{static_cast<W*>(parts), static_cast<W*>(counts)};
    const int packs = packs_of(ceil_div(channels, N));
    if (count > 0) {
      const int error = SPECTRALX_LAUNCH(
          (moment_parts<S, N>), grid_of(channels, N, packs, count), kTile,
          2 * kTile * N * sizeof(W), on, static_cast<const S*>(x), rows, ceil_div(rows, count),
          static_cast<int>(channels), packs, by);
      if (error != 0) return error;
    }
    return joined<W>(by, count, static_cast<int>(channels), static_cast<W*>(moments), on);
  });
}

int spectralx_normalize(const SpectralxNorm* p, void* stream) {
  return pass_over(*p, [&](auto activation, auto tag, auto n, int packs, dim3 grid) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((normalize<decltype(activation), S, decltype(n)::value>), grid, kTile, 0,
                            static_cast<cudaStream_t>(stream), pass_of<S>(*p, packs));
  });
}

int spectralx_norm_sums(const SpectralxNorm* p, void* parts, void* sums, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t count = spectralx_moment_parts(p->rows);
  return with_pass(*p, [&](auto activation, auto tag, auto n) {
    using A = decltype(activation);
    using S = decltype(tag);
    using W = Wide<S>;
    constexpr int N = decltype(n)::value;
    const int packs = packs_of(ceil_div(p->channels, N));
    if (count > 0) {
      const int error = SPECTRALX_LAUNCH(
          (norm_parts<A, S, N>), grid_of(p->channels, N, packs, count), kTile,
          2 * kTile * N * sizeof(W), on, pass_of<S>(*p, packs), ceil_div(p->rows, count),
          static_cast<W*>(parts));
      if (error != 0) return error;
    }
    return launch_total(static_cast<const W*>(parts), count, 2 * p->channels, static_cast<W*>(sums),
                        on);
  });
}

int spectralx_norm_gradient(const SpectralxNorm* p, void* stream) {
  return pass_over(*p, [&](auto activation, auto tag, auto n, int packs, dim3 grid) {
    using S = decltype(tag);
    return SPECTRALX_LAUNCH((norm_gradient<decltype(activation), S, decltype(n)::value>), grid, kTile, 0,
                            static_cast<cudaStream_t>(stream), pass_of<S>(*p, packs));
  });
}
}
