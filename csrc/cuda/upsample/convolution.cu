// Launches of the sums between the products of an upsampled convolution.
#include <algorithm>

#include "cuda/common/dispatch.h"
#include "cuda/upsample/convolution.cuh"
#include "cuda/upsample/kernels.h"

namespace {

using namespace spectralx::cuda;

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid's first dimension

template <typename W>
struct Axes {
  TapAxis<W> rows, columns;

  explicit Axes(const SpectralxConvolution& p)
      : rows(axis(p.height, p.up_height, p.kernel_rows, p.row_padding, p.align_corners)),
        columns(axis(p.width, p.up_width, p.kernel_columns, p.column_padding, p.align_corners)) {
    rows.places = static_cast<Place<W>*>(p.places);
    columns.places = rows.places + p.up_height;
    rows.begins = reinterpret_cast<int*>(columns.places + p.up_width);
    columns.begins = rows.begins + p.height + 1;
  }

  int fill(cudaStream_t on) const {
    const int most = std::max({rows.axis.size, columns.axis.size, rows.axis.length + 1,
                               columns.axis.length + 1});
    return SPECTRALX_LAUNCH((tap_places<W>), static_cast<unsigned>(ceil_div(most, kTile)), kTile, 0,
                            on, rows, columns);
  }

 private:
  static TapAxis<W> axis(int64_t length, int64_t size, int64_t taps, int64_t padding,
                         int64_t align_corners) {
    return {{static_cast<int>(length), static_cast<int>(size), align_corners != 0},
            static_cast<int>(taps),
            static_cast<int>(padding),
            static_cast<int>(size + 2 * padding - taps + 1),
            nullptr,
            nullptr};
  }
};

// The power of two from 1 to `most` that `count` fills best.
int filled(int64_t count, int most) {
  int width = 1;
  while (width < most && width < count) width *= 2;
  return width;
}

Tiling tiling_of(bool channels_last, int64_t lines, int64_t columns, int64_t packs,
                 int64_t groups) {
  Tiling t;
  t.channels_last = channels_last;
  if (channels_last) {
    t.packs = filled(packs, 32);
    t.columns = kTile / t.packs;
  } else {
    t.columns = filled(columns, kTile);
    t.packs = kTile / t.columns;
  }
  t.column_tiles = static_cast<int>(ceil_div(columns, t.columns));
  t.pack_tiles = static_cast<int>(ceil_div(packs, t.packs));
  t.lines = static_cast<int>(lines);
  t.groups = static_cast<int>(groups);
  return t;
}

// Of the sum, N channels a thread.
Tiling sum_tiling(const SpectralxConvolution& p, int64_t n) {
  const int64_t rows = p.up_height + 2 * p.row_padding - p.kernel_rows + 1;
  const int64_t columns = p.up_width + 2 * p.column_padding - p.kernel_columns + 1;
  return tiling_of(p.out_channel == 1, ceil_div(rows, kOutRows), columns, ceil_div(p.channels, n),
                   1);
}

template <typename S>
Map<S> map_of(S* data, int64_t image, int64_t channel, int64_t row, int64_t column) {
  constexpr int64_t kSize = Pack<S>::kSize;
  return {data, image, channel, row, column,
          on_16(data) && channel == 1 && image % kSize == 0 && row % kSize == 0 &&
              column % kSize == 0};
}

template <typename S>
bool takes_packs(const SpectralxConvolution& p) {
  return p.channels % Pack<S>::kSize == 0 && on_16(p.z);
}

template <typename S, int N>
int sum(const SpectralxConvolution& p, cudaStream_t on) {
  using W = Wide<S>;
  const Axes<W> axes(p);
  const Map<S> out =
      map_of(static_cast<S*>(p.out), p.out_image, p.out_channel, p.out_row, p.out_column);
  const Epilogue<S> epilogue{static_cast<const W*>(p.bias),
                             map_of(static_cast<const S*>(p.addend), p.addend_image,
                                    p.addend_channel, p.addend_row, p.addend_column),
                             p.relu != 0};
  const Tiling tiling = sum_tiling(p, N);
  const int64_t blocks = tiling.blocks(p.batch);
  if (blocks > kMostBlocks) return kInvalidValue;
  if (const int error = axes.fill(on)) return error;
  const MomentParts<W> parts{static_cast<W*>(p.parts), static_cast<W*>(p.counts)};
  const auto launched = [&](auto kernel, size_t shared) {
    return SPECTRALX_LAUNCH(kernel, static_cast<unsigned>(blocks), kTile, shared, on, tiling,
                            axes.rows, axes.columns, static_cast<int>(p.channels),
                            static_cast<const S*>(p.z), epilogue, out, parts);
  };
  return p.parts ? launched((tap_sum<S, N, true>), 2 * kTile * N * sizeof(W))
                 : launched((tap_sum<S, N, false>), 0);
}

template <typename S, int N, int G>
int gather(const SpectralxConvolution& p, cudaStream_t on) {
  const Axes<Wide<S>> axes(p);
  const Tiling tiling =
      tiling_of(true, p.height, p.width, ceil_div(p.channels, N),
                ceil_div(p.kernel_rows, G) * ceil_div(p.kernel_columns, G));
  const int64_t blocks = tiling.blocks(p.batch);
  if (blocks > kMostBlocks) return kInvalidValue;
  if (const int error = axes.fill(on)) return error;
  return SPECTRALX_LAUNCH((tap_gather<S, N, G>), static_cast<unsigned>(blocks), kTile, 0, on,
                          tiling, axes.rows, axes.columns, static_cast<int>(p.channels),
                          static_cast<const S*>(p.grad), static_cast<S*>(p.dz));
}

template <typename S, int N>
int sums(const void* x, int64_t rows, int64_t channels, void* parts, void* total,
         cudaStream_t on) {
  using W = Wide<S>;
  const int64_t count = spectralx_channel_parts(rows);
  const int64_t packs = ceil_div(channels, N);
  const int of_block = filled(packs, 32);
  if (count > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_div(packs, of_block)), static_cast<unsigned>(count));
    const int error = SPECTRALX_LAUNCH((channel_parts<S, N>), grid, kTile, kTile * N * sizeof(W),
                                       on, static_cast<const S*>(x), rows, ceil_div(rows, count),
                                       static_cast<int>(channels), of_block,
                                       static_cast<W*>(parts));
    if (error != 0) return error;
  }
  return launch_total(static_cast<const W*>(parts), count, channels, static_cast<W*>(total), on);
}

}  // namespace

extern "C" {

int64_t spectralx_convolution_places(const SpectralxConvolution* p) {
  const int64_t place = p->type == kDouble ? sizeof(Place<double>) : sizeof(Place<float>);
  return (p->up_height + p->up_width) * place +
         (p->height + p->width + 2) * static_cast<int64_t>(sizeof(int));
}

int spectralx_tap_sum(const SpectralxConvolution* p, void* stream) {
  if (p->batch == 0) return 0;
  const auto on = static_cast<cudaStream_t>(stream);
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    using S = decltype(tag);
    constexpr int kSize = Pack<S>::kSize;
    return takes_packs<S>(*p) ? sum<S, kSize>(*p, on) : sum<S, 1>(*p, on);
  });
}

int64_t spectralx_tap_sum_parts(const SpectralxConvolution* p) {
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    using S = decltype(tag);
    const Tiling tiling = sum_tiling(*p, takes_packs<S>(*p) ? Pack<S>::kSize : 1);
    return p->batch * tiling.lines * tiling.column_tiles;
  });
}

int spectralx_tap_gather(const SpectralxConvolution* p, void* stream) {
  if (p->batch == 0) return 0;
  const auto on = static_cast<cudaStream_t>(stream);
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    using S = decltype(tag);
    constexpr int kSize = Pack<S>::kSize;
    const bool packs = p->channels % kSize == 0 && on_16(p->grad) && on_16(p->dz);
    if (p->kernel_rows == 1 && p->kernel_columns == 1)
      return packs ? gather<S, kSize, 1>(*p, on) : gather<S, 1, 1>(*p, on);
    return packs ? gather<S, kSize, kTapGroup>(*p, on) : gather<S, 1, kTapGroup>(*p, on);
  });
}

int64_t spectralx_channel_parts(int64_t rows) {
  return std::min<int64_t>(ceil_div(rows, 64), 256);
}

int spectralx_channel_sums(int64_t type, const void* x, int64_t rows, int64_t channels, void* parts,
                           void* total, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return with_type(static_cast<int>(type), [&](auto tag) {
    using S = decltype(tag);
    constexpr int kSize = Pack<S>::kSize;
    return channels % kSize == 0 && on_16(x) ? sums<S, kSize>(x, rows, channels, parts, total, on)
                                             : sums<S, 1>(x, rows, channels, parts, total, on);
  });
}
}
