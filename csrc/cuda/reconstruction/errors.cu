// Launches of the reconstruction losses.
#include "cuda/reconstruction/errors.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/common/dispatch.h"
#include "cuda/reconstruction/kernels.h"

namespace {

using namespace spectralx::cuda;

int64_t down(const SpectralxErrors& p) { return ceil_div(p.height, p.cell_rows); }
int64_t across(const SpectralxErrors& p) { return ceil_div(p.width, p.cell_columns); }
int64_t cells(const SpectralxErrors& p) { return p.batch * down(p) * across(p); }
bool wanted(const SpectralxErrors& p) { return p.errors != nullptr || p.gradient != nullptr; }

template <typename S>
ErrorPass<S> pass_of(const SpectralxErrors& p) {
  using W = Wide<S>;
  ErrorPass<S> pass{};
  pass.bands = static_cast<int>(p.bands);
  pass.height = static_cast<int>(p.height), pass.width = static_cast<int>(p.width);
  pass.cell_rows = static_cast<int>(p.cell_rows);
  pass.cell_columns = static_cast<int>(p.cell_columns);
  pass.down = static_cast<int>(down(p)), pass.across = static_cast<int>(across(p));
  pass.by_image = p.by_image, pass.by_cell_row = p.by_cell_row;
  pass.by_cell_column = p.by_cell_column;
  pass.by_row = p.by_row, pass.by_column = p.by_column, pass.by_band = p.by_band;
  pass.absolute = p.absolute != 0, pass.last = p.by_band == 1 && p.bands > 1;
  pass.factor = static_cast<W>(p.factor);
  pass.mask = {p.mask, static_cast<int>(p.mask_type)};
  pass.prediction = as<S>(p.prediction), pass.upstream = as<S>(p.upstream);
  pass.count = as<W>(p.count), pass.errors = as<W>(p.errors), pass.gradient = as<S>(p.gradient);
  return pass;
}

template <typename I>
Images<I> images_of(const SpectralxErrors& p) {
  return {as<I>(p.images), static_cast<int>(p.image_height), static_cast<int>(p.image_width)};
}

// Calls run(S, I) with the types of prediction and images.
template <typename Run>
int with_types(const SpectralxErrors& p, const Run& run) {
  return with_type(static_cast<int>(p.type), [&](auto tag) {
    using S = decltype(tag);
    if (p.image_type == p.type) return run(S{}, S{});
    return p.image_type == (std::is_same_v<S, double> ? kDouble : kFloat) ? run(S{}, Wide<S>{})
                                                                         : kInvalidValue;
  });
}

template <typename W>
constexpr size_t scratch() {
  return kErrorWarps * sizeof(W);
}

// Shared memory of the passes that keep where a cell's rows and columns come from.
template <typename W>
int64_t shared_of(const SpectralxErrors& p) {
  return scratch<W>() + (p.cell_rows + p.cell_columns) * sizeof(Place<W>);
}

// Places in a cell are ints, and so are pixels of an image; the grid has one dimension.
bool fits(const SpectralxErrors& p) {
  constexpr int64_t kMost = (int64_t(1) << 31) - kAtOnce * kErrorThreads;
  return p.cell_rows * p.cell_columns * p.bands < kMost && cells(p) < kMost &&
         p.image_height * p.image_width < kMost;
}

// An average of pixels repeated evenly is that of the pixels, where windows are whole ones.
void windows_of(const SpectralxErrors& high, int64_t height, int64_t width, Windows& vertical,
                Windows& across) {
  const auto evenly = [](int64_t full, int64_t source, int64_t size) {
    return full % source == 0 && source % size == 0;
  };
  const bool plain = evenly(high.height, high.image_height, height) &&
                     evenly(high.width, high.image_width, width);
  const auto window = [&](int64_t source, int64_t full, int64_t size) {
    return Windows{static_cast<int>(source), static_cast<int>(plain ? source : full),
                   static_cast<int>(size)};
  };
  vertical = window(high.image_height, high.height, height);
  across = window(high.image_width, high.width, width);
}

}  // namespace

extern "C" {

int64_t spectralx_error_cells(const SpectralxErrors* p) { return down(*p) * across(*p); }

int spectralx_patch_errors(const SpectralxErrors* p, int64_t normalize, void* stream) {
  if (p->batch == 0) return 0;
  if (!fits(*p)) return kInvalidValue;
  return with_types(*p, [&](auto s, auto i) {
    using S = decltype(s);
    using I = decltype(i);
    return SPECTRALX_LAUNCH((patch_errors<S, I>), static_cast<unsigned>(cells(*p)), kErrorThreads,
                            scratch<Wide<S>>(), static_cast<cudaStream_t>(stream), pass_of<S>(*p),
                            images_of<I>(*p), normalize != 0);
  });
}

int spectralx_resized_errors(const SpectralxErrors* p, void* stream) {
  if (p->batch == 0) return 0;
  return with_types(*p, [&](auto s, auto i) {
    using S = decltype(s);
    using I = decltype(i);
    const int64_t shared = shared_of<Wide<S>>(*p);
    if (!fits(*p) || shared > kSharedLimit) return kInvalidValue;
    return SPECTRALX_LAUNCH((resized_errors<S, I>), static_cast<unsigned>(cells(*p)),
                            kErrorThreads, static_cast<size_t>(shared),
                            static_cast<cudaStream_t>(stream), pass_of<S>(*p), images_of<I>(*p));
  });
}

int spectralx_band_errors(const SpectralxErrors* high, const SpectralxErrors* low, const void* base,
                          int64_t base_height, int64_t base_width, void* stream) {
  const int64_t of_high = wanted(*high) ? cells(*high) : 0;
  const int64_t blocks = of_high + (wanted(*low) ? cells(*low) : 0);
  if (blocks == 0) return 0;
  Windows vertical{}, across{};
  windows_of(*high, low->height, low->width, vertical, across);
  return with_types(*high, [&](auto s, auto i) {
    using S = decltype(s);
    using I = decltype(i);
    using W = Wide<S>;
    const int64_t shared = std::max(shared_of<W>(*high), shared_of<W>(*low));
    if (!fits(*high) || !fits(*low) || shared > kSharedLimit || blocks >> 31 != 0) {
      return kInvalidValue;
    }
    const Images<W> small{as<W>(base), static_cast<int>(base_height),
                          static_cast<int>(base_width)};
    return SPECTRALX_LAUNCH((band_errors<S, I>), static_cast<unsigned>(blocks), kErrorThreads,
                            static_cast<size_t>(shared), static_cast<cudaStream_t>(stream),
                            pass_of<S>(*high), pass_of<S>(*low), of_high, images_of<I>(*high), small,
                            vertical, across);
  });
}

int spectralx_band_base(const SpectralxErrors* high, int64_t base_height, int64_t base_width,
                        void* base, void* count, void* stream) {
  const int64_t planes = high->batch * high->bands;
  const int64_t blocks = ceil_div(planes * base_height * base_width, int64_t(kErrorWarps)) +
                         (count != nullptr ? 1 : 0);
  if (blocks == 0) return 0;
  Windows vertical{}, across{};
  windows_of(*high, base_height, base_width, vertical, across);
  return with_type(static_cast<int>(high->image_type), [&](auto tag) {
    using I = decltype(tag);
    using W = Wide<I>;
    return SPECTRALX_LAUNCH((band_base<I>), static_cast<unsigned>(blocks), kErrorThreads,
                            scratch<W>(), static_cast<cudaStream_t>(stream), images_of<I>(*high),
                            planes, vertical, across,
                            Mask{high->mask, static_cast<int>(high->mask_type)}, cells(*high),
                            as<W>(base), as<W>(count));
  });
}

int spectralx_mask_count(const SpectralxErrors* p, void* count, void* stream) {
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    using W = Wide<decltype(tag)>;
    return SPECTRALX_LAUNCH((mask_count<W>), 1, kMeanThreads, kMeanThreads / 32 * sizeof(W),
                            static_cast<cudaStream_t>(stream),
                            Mask{p->mask, static_cast<int>(p->mask_type)}, cells(*p), as<W>(count));
  });
}

int spectralx_mean_error(const SpectralxErrors* first, const SpectralxErrors* second, void* loss,
                         void* stream) {
  return with_type(static_cast<int>(first->type), [&](auto tag) {
    using S = decltype(tag);
    using W = Wide<S>;
    return SPECTRALX_LAUNCH(
        (mean_error<S>), 1, kMeanThreads, kMeanThreads / 32 * sizeof(W),
        static_cast<cudaStream_t>(stream), as<W>(first->errors),
        second != nullptr ? as<W>(second->errors) : nullptr, static_cast<W>(first->factor),
        second != nullptr ? static_cast<W>(second->factor) : W(0),
        Mask{first->mask, static_cast<int>(first->mask_type)}, cells(*first), as<S>(loss));
  });
}
}
