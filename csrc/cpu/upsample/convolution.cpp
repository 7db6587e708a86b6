// spectralx::upsample_conv2d on the CPU. Maths: spectralx_kernels/upsample/README.md.
//
// Everything lies in channels-last order. A task takes a chunk of output channels of some images:
// it packs its part of the weight to [ky * kx, chunk, C], takes the products Z on the small map by
// the library behind ATen, sums Z over the columns' taps into lines and the lines into output rows.
// Z and the lines of a task fit in the cache. Backward goes the same way round: each line gathers
// the output rows that took from it, in ascending order. Tasks depend on shapes alone, so results
// do not depend on the number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "cpu/upsample/interpolation.h"
#include "cpu/upsample/lines.h"
#include "cpu/upsample/products.h"

namespace {

using at::Tensor;
using spectralx::cpu::Axis;
using spectralx::cpu::line_kernels;
using spectralx::cpu::product;
using spectralx::cpu::product_type;
using spectralx::cpu::Term;

constexpr int64_t kChunk = 64;         // channels of a task
constexpr int64_t kImages = 8;         // images of a task, which share its packed weight
constexpr int64_t kBytes = 2 << 20;    // of Z and the lines of a task, if one line allows
constexpr int64_t kGroupRows = 1024;   // pixels of the small maps whose gradient of Z exists at a time

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

struct Shape {
  int64_t batch, channels, height, width, outs, ky, kx, rows, columns;  // rows, columns: output's
  int64_t taps() const { return ky * kx; }
  int64_t chunks() const { return (outs + kChunk - 1) / kChunk; }
  int64_t chunk(int64_t i) const { return std::min(kChunk, outs - i * kChunk); }
};

Shape shape_of(const Tensor& x, const Tensor& weight, at::IntArrayRef size,
               at::IntArrayRef padding) {
  TORCH_CHECK(x.dim() == 4, "x: got ", x.dim(), " dimensions, expected 4");
  TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1), "weight: got shape ",
              weight.sizes(), ", expected [out, ", x.size(1), ", rows, columns]");
  TORCH_CHECK(size.size() == 2 && padding.size() == 2, "size, padding: expected two integers");
  const Shape s{x.size(0),      x.size(1),      x.size(2),
                x.size(3),      weight.size(0), weight.size(2),
                weight.size(3), size[0] + 2 * padding[0] - weight.size(2) + 1,
                size[1] + 2 * padding[1] - weight.size(3) + 1};
  TORCH_CHECK(s.rows > 0 && s.columns > 0, "size: got ", size,
              ", expected at least the kernel less twice the padding");
  return s;
}

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<T>();
}

// [pixels, channels] of a channels-last map.
Tensor as_rows(const Tensor& map) {
  return map.permute({0, 2, 3, 1}).reshape({-1, map.size(1)});
}

std::vector<int64_t> tap_offsets(const Tensor& weight) {
  std::vector<int64_t> offsets;
  for (int64_t s = 0; s < weight.size(2); ++s) {
    for (int64_t t = 0; t < weight.size(3); ++t) {
      offsets.push_back(s * weight.stride(2) + t * weight.stride(3));
    }
  }
  return offsets;
}

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

// Input channels [in, in + ins): [ins, taps * O], the latter in the order of the gradient of Z,
// chunks of [taps, channels].
template <typename S, typename A>
Tensor packed_inputs(const Shape& s, const Tensor& weight, int64_t in, int64_t ins) {
  Tensor to = at::empty({ins, s.taps() * s.outs}, weight.options());
  const std::vector<int64_t> taps = tap_offsets(weight);
  for (int64_t i = 0; i < s.chunks(); ++i) {
    line_kernels<S, A>().pack(
        weight.const_data_ptr<S>() + i * kChunk * weight.stride(0) + in * weight.stride(1),
        taps.data(), s.taps(), ins, s.chunk(i), weight.stride(1), weight.stride(0), s.chunk(i),
        to.stride(0), data<S>(to) + i * kChunk * s.taps());
  }
  return to;
}

// Sources and weights of one weighted sum.
template <typename S, typename A>
struct Sum {
  std::vector<const S*> sources;
  std::vector<A> weights;
  int64_t n = 0;

  explicit Sum(int64_t most) : sources(most), weights(most) {}
  void add(const S* source, A weight) {
    sources[n] = source;
    weights[n++] = weight;
  }
};

template <typename S, typename A>
struct Forward {
  const Shape& s;
  const Axis<A>&rows, &columns;
  const A* bias;       // [O] or null
  const S* addend;     // channels-last as out, or null
  bool relu;
  S* out;              // [B, H', W', O]

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
    at::parallel_for(0, groups * s.chunks(), 1, [&](int64_t first, int64_t last) {
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

// Gradient of Z for one line of one image's chunk. grad [B, H', W', O]; dz has `row` elements a
// pixel, of which the chunk's [taps, channels] begin at its place.
template <typename S, typename A>
void line_backward(const Shape& s, const Axis<A>& rows, const Axis<A>& columns, const S* grad,
                   int64_t image, int64_t line, int64_t chunk, std::vector<A>& buffer, int64_t row,
                   S* dz) {
  const auto& kernels = line_kernels<S, A>();
  const int64_t channels = s.chunk(chunk), width = s.columns * channels;
  buffer.resize(s.ky * width);
  Sum<S, A> down(rows.most_terms());
  for (int64_t tap = 0; tap < s.ky; ++tap) {
    down.n = 0;
    const int64_t place = line * s.ky + tap;
    for (int64_t i = rows.first_of_line[place]; i < rows.first_of_line[place + 1]; ++i) {
      const Term<A>& term = rows.by_line[i];
      down.add(grad + (image * s.rows + term.out) * s.columns * s.outs + chunk * kChunk,
               term.weight);
    }
    kernels.weighted_sum(down.sources.data(), down.weights.data(), down.n, s.columns, channels,
                         s.outs, buffer.data() + tap * width);
  }
  Sum<A, A> across(columns.most_terms());
  for (int64_t x = 0; x < s.width; ++x) {
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      across.n = 0;
      const int64_t place = x * s.kx + tap % s.kx;
      for (int64_t i = columns.first_of_line[place]; i < columns.first_of_line[place + 1]; ++i) {
        const Term<A>& term = columns.by_line[i];
        across.add(buffer.data() + tap / s.kx * width + term.out * channels, term.weight);
      }
      kernels.weighted_sum_stored(across.sources.data(), across.weights.data(), across.n, channels,
                                  dz + x * row + tap * channels);
    }
  }
}

// Gradients of x [B * h * w, C] and of weight, each where defined; grad [B, H', W', O].
template <typename S, typename A>
void backward(const Shape& s, const Axis<A>& rows, const Axis<A>& columns, const S* grad,
              const Tensor& x, const Tensor& weight, const Tensor& dx, const Tensor& dweight) {
  const int64_t row = s.taps() * s.outs, lines = s.batch * s.height;
  const int64_t group = std::max<int64_t>(kGroupRows / s.width, 1);
  const int64_t blocks = (s.channels + kChunk - 1) / kChunk;
  for (int64_t begin = 0; begin < lines; begin += group) {
    const int64_t count = std::min(group, lines - begin);
    Tensor dz = at::empty({count * s.width, row}, weight.options());
    at::parallel_for(0, count * s.chunks(), 4, [&](int64_t first, int64_t last) {
      std::vector<A> buffer;
      for (int64_t task = first; task < last; ++task) {
        const int64_t chunk = task / count, line = begin + task % count;
        line_backward(s, rows, columns, grad, line / s.height, line % s.height, chunk, buffer, row,
                      data<S>(dz) + task % count * s.width * row + chunk * kChunk * s.taps());
      }
    });
    if (dx.defined()) {
      Tensor part = dx.narrow(0, begin * s.width, count * s.width);
      at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t ins = std::min(kChunk, s.channels - block * kChunk);
          part.narrow(1, block * kChunk, ins)
              .copy_(product(dz, packed_inputs<S, A>(s, weight, block * kChunk, ins)));
        }
      });
    }
    if (dweight.defined()) {
      const Tensor across = x.narrow(0, begin * s.width, count * s.width).t().contiguous();
      at::parallel_for(0, s.chunks(), 1, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
          const int64_t outs = s.chunk(chunk), size = outs * s.taps();
          Tensor part = at::empty({size, across.size(1)}, dz.options());
          line_kernels<S, A>().transpose(dz.const_data_ptr<S>() + chunk * kChunk * s.taps(),
                                         across.size(1), size, row, across.size(1), data<S>(part));
          const Tensor found = product(across, part);
          // [C, ky, kx, outs] -> [outs, C, ky, kx]
          line_kernels<S, A>().unpack(found.const_data_ptr<S>(), tap_offsets(dweight).data(),
                                      s.taps(), outs, s.channels, dweight.stride(0),
                                      dweight.stride(1), begin > 0,
                                      data<S>(dweight) + chunk * kChunk * dweight.stride(0));
        }
      });
    }
  }
}

// Sums over all pixels: rows first, then the rows in order.
template <typename S, typename A>
Tensor channel_sums(const Shape& s, const S* grad, const at::TensorOptions& options) {
  const auto& kernels = line_kernels<S, A>();
  Tensor partial = at::zeros({s.batch * s.rows, s.outs}, options);
  at::parallel_for(0, s.batch * s.rows, 8, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      kernels.add_pixels(grad + row * s.columns * s.outs, s.columns, s.outs, s.outs,
                         data<A>(partial) + row * s.outs);
    }
  });
  Tensor total = at::zeros({s.outs}, options);
  for (int64_t row = 0; row < s.batch * s.rows; ++row) {
    for (int64_t o = 0; o < s.outs; ++o) data<A>(total)[o] += data<A>(partial)[row * s.outs + o];
  }
  return total;
}

// A large map in the other layout: [B, C, H, W] to channels last, or back where `planes`.
template <typename S, typename A>
Tensor relaid(const Tensor& map, bool planes) {
  const int64_t channels = map.size(1), rows = map.size(2), columns = map.size(3);
  Tensor to = at::empty(map.sizes(), map.options(),
                        planes ? at::MemoryFormat::Contiguous : kChannelsLast);
  const int64_t area = rows * columns, lines = map.size(0) * rows;
  at::parallel_for(0, lines, 4, [&](int64_t first, int64_t last) {
    for (int64_t line = first; line < last; ++line) {
      const int64_t image = line / rows * channels * area, place = line % rows * columns;
      const int64_t pixel = image + place * channels, plane = image + place;
      const S* from = map.const_data_ptr<S>();
      if (planes) {
        line_kernels<S, A>().transpose(from + pixel, columns, channels, channels, area,
                                       data<S>(to) + plane);
      } else {
        line_kernels<S, A>().transpose(from + plane, channels, columns, area, channels,
                                       data<S>(to) + pixel);
      }
    }
  });
  return to;
}

Tensor resized(const Tensor& x, at::IntArrayRef size, bool align_corners) {
  if (x.sizes().slice(2) == size) return x;
  return at::upsample_bilinear2d(x, size, align_corners);
}

std::optional<Tensor> converted(const std::optional<Tensor>& tensor, at::ScalarType type) {
  return tensor.has_value() ? std::optional<Tensor>(tensor->to(type)) : std::nullopt;
}

#define SPECTRALX_DISPATCH(type, ...)                                        \
  if ((type) == at::kDouble) {                                               \
    using S = double;                                                        \
    using A = double;                                                        \
    __VA_ARGS__();                                                           \
  } else if ((type) == at::kBFloat16) {                                      \
    using S = c10::BFloat16;                                                 \
    using A = float;                                                         \
    __VA_ARGS__();                                                           \
  } else {                                                                   \
    using S = float;                                                         \
    using A = float;                                                         \
    __VA_ARGS__();                                                           \
  }

Tensor upsample_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& addend, at::IntArrayRef size,
                       at::IntArrayRef padding, bool align_corners, bool by_taps, bool relu) {
  const Shape s = shape_of(x, weight, size, padding);
  if (addend.has_value()) {
    TORCH_CHECK(addend->sizes() == at::IntArrayRef({s.batch, s.outs, s.rows, s.columns}),
                "addend: got shape ", addend->sizes(), ", expected that of the output");
  }
  // Channels last where x is that and nothing else.
  const auto format = x.is_contiguous(kChannelsLast) && !x.is_contiguous()
                          ? kChannelsLast
                          : at::MemoryFormat::Contiguous;
  if (!by_taps) {
    Tensor out = at::conv2d(resized(x, size, align_corners), weight, bias, 1, padding);
    if (addend.has_value()) out.add_(*addend);
    if (relu) out.relu_();
    return out.contiguous(format);
  }
  const auto type = product_type(x.scalar_type());
  const auto sums = type == at::kDouble ? at::kDouble : at::kFloat;
  Tensor out = at::empty({s.batch, s.outs, s.rows, s.columns}, x.options().dtype(type),
                         kChannelsLast);
  const Tensor small = as_rows(x.to(type)), filters = weight.to(type);
  const auto wide = converted(bias, sums);
  std::optional<Tensor> more = converted(addend, type);
  if (more.has_value()) more = more->contiguous(kChannelsLast);
  SPECTRALX_DISPATCH(type, [&] {
    const Axis<A> rows(s.height, size[0], s.ky, padding[0], align_corners);
    const Axis<A> columns(s.width, size[1], s.kx, padding[1], align_corners);
    const Tensor flat = wide.has_value() ? wide->contiguous() : Tensor();
    Forward<S, A>{s,
                  rows,
                  columns,
                  flat.defined() ? flat.const_data_ptr<A>() : nullptr,
                  more.has_value() ? more->const_data_ptr<S>() : nullptr,
                  relu,
                  data<S>(out)}
        .run(small, filters);
    if (format == at::MemoryFormat::Contiguous) out = relaid<S, A>(out, true);
  });
  return out.to(x.scalar_type());
}

// `grad` laid out as `torch.empty_like` of the input is; itself where it is that already.
Tensor laid_out(const Tensor& grad, const Tensor& input) {
  Tensor to = at::empty_like(input, input.options().device(at::kMeta));
  if (grad.strides() == to.strides() && grad.scalar_type() == input.scalar_type()) return grad;
  return at::empty_like(input).copy_(grad);
}

// output_mask names the inputs in the order of the schema; the wanted gradients come in that order.
std::vector<Tensor> upsample_conv2d_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, at::IntArrayRef size,
    at::IntArrayRef padding, bool align_corners, bool by_taps, bool relu, at::TensorList saved,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1, "output_grads: got ", output_grads.size(), ", expected 1");
  TORCH_CHECK(output_mask.size() == 9, "output_mask: got ", output_mask.size(), ", expected 9");
  TORCH_CHECK(saved.size() == (relu ? 1 : 0), "saved: got ", saved.size(), " tensors, expected ",
              relu ? 1 : 0);
  const Shape s = shape_of(x, weight, size, padding);
  const std::optional<Tensor> given = output_grads[0];
  const std::array<Tensor, 4> inputs = {x, weight, bias.value_or(Tensor()),
                                        addend.value_or(Tensor())};
  std::array<Tensor, 4> found;
  for (size_t i = 0; i < 4; ++i) {
    // Of the ordinary path's, what the library returns is taken over.
    if (output_mask[i] && (by_taps || i == 3 || !given.has_value())) {
      found[i] = at::empty_like(inputs[i]);
    }
  }
  const auto wanted = [&] {
    std::vector<Tensor> list;
    for (const Tensor& grad : found) {
      if (grad.defined()) list.push_back(grad);
    }
    return list;
  };
  if (!given.has_value()) {
    for (Tensor& grad : found) {
      if (grad.defined()) grad.zero_();
    }
    return wanted();
  }
  Tensor grad = relu ? at::threshold_backward(*given, saved[0], 0) : *given;
  if (found[3].defined()) found[3].copy_(grad);

  const auto type = by_taps ? product_type(x.scalar_type()) : x.scalar_type();
  const auto sums = type == at::kDouble ? at::kDouble : at::kFloat;
  if (!by_taps) {
    const Tensor large = resized(x, size, align_corners);
    auto [dlarge, dweight, dbias] = at::convolution_backward(
        grad, large, weight, at::OptionalIntArrayRef(weight.sizes().slice(0, 1)), {1, 1}, padding,
        {1, 1}, false, {0, 0}, 1, {output_mask[0], output_mask[1], output_mask[2]});
    if (output_mask[0]) {
      if (x.sizes().slice(2) != size) {
        dlarge = at::upsample_bilinear2d_backward(dlarge, size, x.sizes(), align_corners);
      }
      found[0] = laid_out(dlarge, x);
    }
    if (output_mask[1]) found[1] = laid_out(dweight, weight);
    if (output_mask[2]) found[2] = laid_out(dbias, *bias);
    return wanted();
  }
  grad = grad.to(type);
  SPECTRALX_DISPATCH(type, [&] {
    if (!grad.is_contiguous(kChannelsLast)) grad = relaid<S, A>(grad.contiguous(), false);
    if (found[2].defined()) {
      found[2].copy_(channel_sums<S, A>(s, grad.const_data_ptr<S>(), grad.options().dtype(sums)));
    }
    if (!found[0].defined() && !found[1].defined()) return;
    const Axis<A> rows(s.height, size[0], s.ky, padding[0], align_corners);
    const Axis<A> columns(s.width, size[1], s.kx, padding[1], align_corners);
    const Tensor small = as_rows(x.to(type)), filters = weight.to(type);
    // Written in place where the layout allows, else copied.
    Tensor dx, dweight;
    if (found[0].defined()) dx = at::empty_like(small);
    if (found[1].defined()) {
      dweight = weight.scalar_type() == type ? found[1] : at::zeros_like(filters);
      if (s.batch == 0) dweight.zero_();
    }
    backward<S, A>(s, rows, columns, grad.const_data_ptr<S>(), small, filters, dx, dweight);
    if (dx.defined()) {
      found[0].copy_(dx.view({s.batch, s.height, s.width, s.channels}).permute({0, 3, 1, 2}));
    }
    if (dweight.defined() && !dweight.is_same(found[1])) found[1].copy_(dweight);
  });
  return wanted();
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("upsample_conv2d", &upsample_conv2d);
  m.impl("upsample_conv2d_backward", &upsample_conv2d_backward);
}
