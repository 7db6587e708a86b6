// The forward pass of taps.h.
#include "cpu/torch.h"

#include "cpu/upsample/products.h"
#include "cpu/upsample/taps.h"

namespace spectralx::cpu {
namespace {

using at::Tensor;

constexpr int64_t kImages = 8;       // images of a task, which share its packed weight
constexpr int64_t kBytes = 2 << 20;  // of Z and the lines of a task, if one line allows

// Output channels [out, out + outs) of the weight: [taps * outs, C].
template <typename S, typename A>
Tensor packed(const Shape& s, const Tensor& weight, int64_t out, int64_t outs) {
  Tensor to = at::empty({s.taps() * outs, s.channels}, weight.options());
  line_kernels<S, A>().pack(weight.const_data_ptr<S>() + out * weight.stride(0),
                            tap_offsets(weight).data(), s.taps(), outs, s.channels,
                            weight.stride(0), weight.stride(1), outs * s.channels, s.channels,
                            data<S>(to));
  return to;
}

template <typename S, typename A>
struct Forward {
  const Shape& s;
  const Axis<A>&rows, &columns;
  const A* bias;       // [O] or null
  const S* addend;     // channels-last as out, or null
  bool relu;
  S* out;              // [B, H', W', O]
  A* moments;          // [B * H', 2, O] or null

  // Rows [begin, end) of one image's chunk. z [lines, w, taps, channels] from line `first_line` on.
  void finish(const S* z, int64_t first_line, int64_t last_line, int64_t image, int64_t begin,
              int64_t end, int64_t chunk, std::vector<A>& lines) const {
    const auto& kernels = line_kernels<S, A>();
    const int64_t channels = s.chunk(chunk), width = s.columns * channels;
    const int64_t pixel = s.taps() * channels, count = last_line - first_line;
    lines.resize(count * s.ky * width + width);
    Sum<S, A> across(columns.most_terms());
    for (int64_t line = 0; line < count; ++line) {
      for (int64_t x = 0; x < s.columns; ++x) {
        for (int64_t tap = 0; tap < s.ky; ++tap) {
          across.n = 0;
          for (int64_t i = columns.first_of_out[x]; i < columns.first_of_out[x + 1]; ++i) {
            const Term<A>& term = columns.by_out[i];
            across.add(z + (line * s.width + term.line) * pixel +
                           (tap * s.kx + term.tap) * channels,
                       term.weight);
          }
          kernels.weighted_sum(across.sources.data(), across.weights.data(), across.n, 1, channels,
                               channels, lines.data() + (line * s.ky + tap) * width + x * channels);
        }
      }
    }
    Sum<A, A> down(rows.most_terms());
    A* sums = lines.data() + count * s.ky * width;
    for (int64_t y = begin; y < end; ++y) {
      down.n = 0;
      for (int64_t i = rows.first_of_out[y]; i < rows.first_of_out[y + 1]; ++i) {
        const Term<A>& term = rows.by_out[i];
        down.add(lines.data() + ((term.line - first_line) * s.ky + term.tap) * width, term.weight);
      }
      kernels.weighted_sum_of_sums(down.sources.data(), down.weights.data(), down.n, width, sums);
      const int64_t at = (image * s.rows + y) * s.columns * s.outs + chunk * kChunk;
      kernels.finish(sums, s.columns, channels, bias ? bias + chunk * kChunk : nullptr,
                     addend ? addend + at : nullptr, relu, s.outs, out + at);
      if (moments) {
        A* part = moments + (image * s.rows + y) * 2 * s.outs + chunk * kChunk;
        kernels.moments(out + at, s.columns, channels, s.outs, part, part + s.outs);
      }
    }
  }

  // x [B * h * w, C].
  void run(const Tensor& x, const Tensor& weight) const {
    const int64_t line_bytes =
        kChunk * s.ky * (s.kx * s.width * static_cast<int64_t>(sizeof(S)) +
                         s.columns * static_cast<int64_t>(sizeof(A)));
    const int64_t lines = std::max<int64_t>(kBytes / line_bytes, 1);
    const int64_t images = std::max<int64_t>(lines / s.height, 1);  // of one product
    // Rows of one product, where a whole image is too much: those that need about `lines` lines.
    const int64_t bands = std::max<int64_t>((s.height + lines - 1) / lines, 1);
    const int64_t band = (s.rows + bands - 1) / bands;
    const int64_t groups = (s.batch + kImages - 1) / kImages, plane = s.height * s.width;
    over_products(groups * s.chunks(), [&](int64_t first, int64_t last) {
      std::vector<A> buffer;
      for (int64_t task = first; task < last; ++task) {
        const int64_t chunk = task / groups, begin = task % groups * kImages;
        const int64_t end = std::min(begin + kImages, s.batch);
        const Tensor part = packed<S, A>(s, weight, chunk * kChunk, s.chunk(chunk));
        if (bands == 1) {
          for (int64_t image = begin; image < end; image += images) {
            const int64_t count = std::min(images, end - image);
            const Tensor z = product(x.narrow(0, image * plane, count * plane), part);
            for (int64_t i = 0; i < count; ++i) {
              finish(z.const_data_ptr<S>() + i * plane * z.size(1), 0, s.height, image + i, 0,
                     s.rows, chunk, buffer);
            }
          }
          continue;
        }
        for (int64_t image = begin; image < end; ++image) {
          for (int64_t y = 0; y < s.rows; y += band) {
            const int64_t until = std::min(y + band, s.rows);
            const auto [low, high] = rows.lines_of(y, until);
            const Tensor z = product(
                x.narrow(0, image * plane + low * s.width, (high - low) * s.width), part);
            finish(z.const_data_ptr<S>(), low, high, image, y, until, chunk, buffer);
          }
        }
      }
    });
  }
};

}  // namespace

void taps_forward(const Shape& s, const Placement& placement, const Tensor& x,
                  const Tensor& weight, const Epilogue& epilogue, const Tensor& out) {
  SPECTRALX_DISPATCH(x.scalar_type(), [&] {
    const Axis<A> rows = placement.axis<A>(s, 0), columns = placement.axis<A>(s, 1);
    const auto& [bias, addend, relu, moments] = epilogue;
    Forward<S, A>{s,
                  rows,
                  columns,
                  bias.defined() ? bias.const_data_ptr<A>() : nullptr,
                  addend.defined() ? addend.const_data_ptr<S>() : nullptr,
                  relu,
                  data<S>(out),
                  moments.defined() ? data<A>(moments) : nullptr}
        .run(x, weight);
  });
}

}  // namespace spectralx::cpu
