// spectralx::pixel_head on the CPU. Maths: spectralx_kernels/reconstruction/README.md.
//
// A map of 4 h x 4 w pixels is several times the size of what comes in. It is made a strip at a time,
// from the first convolution to the last. Backward makes it again, but for the first product's result
// where the caller keeps that. A strip goes as far as the lines at hand allow, since a 3x3 convolution
// wants a line above and one below; `Window` keeps those that the next strip needs. Strips run in order
// and their sums are added in order.
//
// h x w: what comes in; k, the first stride: k h x k w, the lines; last stride: pixels.
#include "cpu/torch.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/linear.h"
#include "cpu/reconstruction/channel_norm.h"
#include "cpu/reconstruction/pixel_head.h"

namespace spectralx::cpu {
namespace {

using namespace strips;
using OptionalTensor = std::optional<Tensor>;

template <typename S, typename A>
class PixelHead {
 public:
  PixelHead(const Sizes& sizes, const Weights& weights, const at::TensorOptions& options)
      : s_(sizes), w_(weights), options_(options.memory_format(std::nullopt)) {}

  // x: rows [batch height width, ins]. The first product of all of them, [rows, up up wide].
  Tensor expanded(const Tensor& x) const { return linear_layer(x, w_.expand, w_.expand_bias); }

  // `expanded` is that, or undefined: made a strip at a time.
  Tensor forward(const Tensor& x, const Tensor& expanded) const {
    const Tensor out = at::empty({s_.batch, s_.bands, s_.down * s_.lines, s_.down * s_.line},
                                 options_, kChannelsLast);
    for (int64_t image = 0; image < s_.batch; ++image) {
      Window<S> hidden = window();
      int64_t from = 0;
      for (int64_t row = 0; row < s_.height; row += s_.strip) {
        const int64_t end = std::min(row + s_.strip, s_.height);
        expand(x, expanded, image, row, end, hidden, nullptr);
        const int64_t to = end == s_.height ? s_.lines : end * s_.up - 1;
        if (to <= from) continue;
        const Tensor half = lines(to - from, s_.half);
        group(hidden, from, to, half, Tensor());
        Tensor mixed = linear_layer(half, w_.mix, w_.mix_bias);
        gelu(mixed, Tensor());
        scatter(linear_layer(mixed, w_.project, w_.project_bias), out, image, from, to);
        hidden.drop(to - 1);
        from = to;
      }
    }
    return out;
  }

  // Gradients by the order of the schema, undefined where not wanted. grad: channels last; those of
  // weights lie as `Weights` has them.
  std::array<Tensor, 9> backward(const Tensor& grad, const Tensor& x, const Tensor& expanded,
                                 const std::array<bool, 9>& wanted) const {
    std::array<Tensor, 9> found;
    const auto sums = options_.dtype(sum_type(options_.dtype().toScalarType()));
    const std::array<const Tensor*, 9> likes{&x,       &w_.expand,   &w_.expand_bias,
                                             &w_.taps, &w_.taps_bias, &w_.mix,
                                             &w_.mix_bias, &w_.project, &w_.project_bias};
    for (int i = 1; i < 9; ++i) {
      if (wanted[i]) found[i] = at::zeros(likes[i]->sizes(), sums);
    }
    if (wanted[0]) found[0] = at::empty_like(x);
    const auto any = [&](int stages) {
      return std::any_of(wanted.begin(), wanted.begin() + stages, [](bool want) { return want; });
    };
    const Backward to{wanted, any(3), any(5), any(7), wanted[0] ? turned(w_.expand) : Tensor(),
                      any(5) ? turned(w_.mix) : Tensor(), any(7) ? turned(w_.project) : Tensor(),
                      w_.taps.flip({0})};
    for (int64_t image = 0; image < s_.batch; ++image) {
      backward_of(image, grad, x, expanded, to, found);
    }
    return found;
  }

 private:
  // What of backward is wanted: anything before the 3x3 convolution, up to it, up to `mix`.
  struct Backward {
    std::array<bool, 9> wanted;
    bool expand, group, mix;
    Tensor expand_turned, mix_turned, project_turned, flipped;
  };

  void backward_of(int64_t image, const Tensor& grad, const Tensor& x, const Tensor& expanded,
                   const Backward& to, std::array<Tensor, 9>& found) const {
    const std::array<bool, 9>& wanted = to.wanted;
    Window<S> hidden = window(), slope = window(), twice = window();
    Window<S> wide(s_.strip + 2, s_.up * s_.line * s_.wide, options_);
    // Lines whose gradient is known behind the 3x3 convolution and before it; rows of x.
    int64_t known = 0, reached = 0, rows = 0;
    for (int64_t row = 0; row < s_.height; row += s_.strip) {
      const int64_t end = std::min(row + s_.strip, s_.height);
      const bool last = end == s_.height;
      expand(x, expanded, image, row, end, hidden, to.expand ? &slope : nullptr);
      const int64_t next = last ? s_.lines : end * s_.up - 1;
      if (next == known) continue;
      const Tensor half = lines(next - known, s_.half);
      const Tensor half_slope = to.group ? at::empty_like(half) : Tensor();
      group(hidden, known, next, half, half_slope);
      Tensor mixed = linear_layer(half, w_.mix, w_.mix_bias);
      const Tensor mixed_slope = to.mix ? at::empty_like(mixed) : Tensor();
      gelu(mixed, mixed_slope);
      const Tensor out_grad = gathered(grad, image, known, next);
      if (wanted[7]) found[7].add_(at::mm(out_grad.t(), mixed));
      if (wanted[8]) add_rows(out_grad, found[8]);
      if (to.mix) {
        const Tensor mixed_grad = input_gradient(out_grad, to.project_turned).mul_(mixed_slope);
        if (wanted[5]) found[5].add_(at::mm(mixed_grad.t(), half));
        if (wanted[6]) add_rows(mixed_grad, found[6]);
        if (to.group) {
          const Tensor half_grad = input_gradient(mixed_grad, to.mix_turned);
          double_lines(half_grad, half_slope, known, next, twice);
          if (wanted[3]) add_taps(twice, hidden, known, next, found[3]);
          if (wanted[4]) add_rows(half_grad.mul_(half_slope), found[4]);
        }
      }
      known = next;
      hidden.drop(known - 1);
      if (!to.expand) {
        twice.drop(known);
        continue;
      }
      const int64_t before = last ? s_.lines : std::max(known - 1, reached);
      wide.extend((before + s_.up - 1) / s_.up);
      spread(twice, slope, to.flipped, reached, before, wide);
      reached = before;
      twice.drop(reached - 1);
      slope.drop(reached);
      const int64_t done = reached / s_.up, first = (image * s_.height + rows) * s_.width;
      if (done == rows) continue;
      const int64_t count = (done - rows) * s_.width;
      const Tensor wide_grad = wide.rows(rows, done - rows).view({count, w_.expand.size(0)});
      if (wanted[1]) found[1].add_(at::mm(wide_grad.t(), x.narrow(0, first, count)));
      if (wanted[2]) add_rows(wide_grad, found[2]);
      if (wanted[0]) {
        found[0].narrow(0, first, count).copy_(input_gradient(wide_grad, to.expand_turned));
      }
      rows = done;
      wide.drop(rows);
    }
  }

  static const HeadKernels<S, A>& kernels() { return head_kernels<S, A>(); }

  Window<S> window() const { return {s_.strip * s_.up + 4, s_.line * s_.wide, options_}; }

  Tensor lines(int64_t count, int64_t channels) const {
    return at::empty({count * s_.line, channels}, options_);
  }

  // The lines of rows [row, end) of an image of x, behind GELU, and its derivative there.
  void expand(const Tensor& x, const Tensor& expanded, int64_t image, int64_t row, int64_t end,
              Window<S>& hidden, Window<S>* slope) const {
    const int64_t first = (image * s_.height + row) * s_.width, count = (end - row) * s_.width;
    const Tensor made = expanded.defined() ? expanded.narrow(0, first, count)
                                           : this->expanded(x.narrow(0, first, count));
    hidden.extend(end * s_.up);
    if (slope != nullptr) slope->extend(end * s_.up);
    const int64_t chunk = s_.up * s_.wide;  // of a line, from a pixel of x
    for_lines(row * s_.up, end * s_.up, [&](int64_t line) {
      const S* values = made.const_data_ptr<S>() +
                        ((line / s_.up - row) * s_.width * s_.up + line % s_.up) * chunk;
      for (int64_t pixel = 0; pixel < s_.width; ++pixel) {
        kernels().gelu(values + pixel * s_.up * chunk, chunk, hidden.at(line) + pixel * chunk,
                       slope == nullptr ? nullptr : slope->at(line) + pixel * chunk);
      }
    });
  }

  // GELU of the 3x3 convolution at lines [first, last), and its derivative if defined.
  void group(const Window<S>& hidden, int64_t first, int64_t last, const Tensor& out,
             const Tensor& slope) const {
    const int64_t length = s_.line * s_.half;
    for_lines(first, last, [&](int64_t line) {
      std::vector<A> scratch(s_.wide);
      const int64_t to = (line - first) * length;
      kernels().grouped(hidden.around(line, s_.lines).data(), s_.line, s_.half,
                        w_.taps.const_data_ptr<A>(), w_.taps_bias.const_data_ptr<A>(),
                        scratch.data(), data<S>(out) + to,
                        slope.defined() ? data<S>(slope) + to : nullptr);
    });
  }

  static void gelu(const Tensor& x, const Tensor& slope) {
    at::parallel_for(0, x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      kernels().gelu(x.const_data_ptr<S>() + begin, end - begin, data<S>(x) + begin,
                     slope.defined() ? data<S>(slope) + begin : nullptr);
    });
  }

  // Lines of the gradient behind the 3x3 convolution, each channel for both that it comes of.
  void double_lines(const Tensor& grad, const Tensor& slope, int64_t first, int64_t last,
                    Window<S>& twice) const {
    twice.extend(last);
    const int64_t length = s_.line * s_.half;
    for_lines(first, last, [&](int64_t line) {
      const int64_t from = (line - first) * length;
      kernels().twice(grad.const_data_ptr<S>() + from, slope.const_data_ptr<S>() + from, length,
                      twice.at(line));
    });
  }

  // Lines [first, last) of the gradient before the first GELU, as the first product made them.
  void spread(const Window<S>& twice, const Window<S>& slope, const Tensor& taps, int64_t first,
              int64_t last, const Window<S>& wide) const {
    const int64_t chunk = s_.up * s_.wide;
    for_lines(first, last, [&](int64_t line) {
      std::vector<A> scratch(s_.wide);
      kernels().depthwise(twice.around(line, s_.lines).data(), s_.line, s_.wide,
                          taps.const_data_ptr<A>(), slope.at(line), s_.up, s_.up * chunk,
                          scratch.data(), wide.at(line / s_.up) + line % s_.up * chunk);
    });
  }

  void add_taps(const Window<S>& twice, const Window<S>& hidden, int64_t first, int64_t last,
                const Tensor& sums) const {
    constexpr int64_t kChannels = 32;
    at::parallel_for(0, (s_.wide + kChannels - 1) / kChannels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = first; line < last; ++line) {
        kernels().tap_gradients(twice.at(line), hidden.around(line, s_.lines).data(), s_.line,
                                s_.wide, begin * kChannels, std::min(end * kChannels, s_.wide),
                                data<A>(sums));
      }
    });
  }

  static void add_rows(const Tensor& rows, const Tensor& sums) {
    sums.add_(rows.sum(0, false, sums.scalar_type()));
  }

  // use(first value in [pixels, down down bands], pixels of the map, values) for every line of
  // pixels that comes of lines [first, last).
  template <typename Use>
  void for_pixels(int64_t image, int64_t first, int64_t last, const Use& use) const {
    const int64_t chunk = s_.down * s_.bands;
    for_lines(first, last, [&](int64_t line) {
      for (int64_t y = 0; y < s_.down; ++y) {
        const int64_t at = ((image * s_.lines + line) * s_.down + y) * s_.line * chunk;
        const int64_t from = ((line - first) * s_.line * s_.down + y) * chunk;
        for (int64_t x = 0; x < s_.line; ++x) use(from + x * s_.down * chunk, at + x * chunk, chunk);
      }
    });
  }

  void scatter(const Tensor& values, const Tensor& out, int64_t image, int64_t first,
               int64_t last) const {
    for_pixels(image, first, last, [&](int64_t from, int64_t to, int64_t count) {
      std::memcpy(data<S>(out) + to, values.const_data_ptr<S>() + from, count * sizeof(S));
    });
  }

  Tensor gathered(const Tensor& grad, int64_t image, int64_t first, int64_t last) const {
    const Tensor values = lines(last - first, s_.down * s_.down * s_.bands);
    for_pixels(image, first, last, [&](int64_t to, int64_t from, int64_t count) {
      std::memcpy(data<S>(values) + to, grad.const_data_ptr<S>() + from, count * sizeof(S));
    });
    return values;
  }

  const Sizes& s_;
  const Weights& w_;
  at::TensorOptions options_;
};

using Given = std::array<Tensor, 8>;

template <typename Run>
void with_head(const Tensor& x, const Given& weights, const Run& run) {
  const auto type = map_type(x.scalar_type());
  const Sizes sizes(x, weights[0], weights[2], weights[4], weights[6], at::elementSize(type));
  const Weights made(sizes, type, weights);
  SPECTRALX_DISPATCH(type, [&] {
    run(PixelHead<S, A>(sizes, made, x.options().dtype(type)), sizes, rows_of_map(x.to(type)));
  });
}

std::tuple<Tensor, Tensor> pixel_head(const Tensor& x, const Tensor& expand,
                                      const Tensor& expand_bias, const Tensor& grouped,
                                      const Tensor& grouped_bias, const Tensor& mix,
                                      const Tensor& mix_bias, const Tensor& project,
                                      const Tensor& project_bias, bool keep) {
  Tensor out, kept = at::empty({0}, x.options().memory_format(std::nullopt));
  with_head(x, {expand, expand_bias, grouped, grouped_bias, mix, mix_bias, project, project_bias},
            [&](const auto& head, const Sizes& s, const Tensor& rows) {
              const Tensor expanded = keep ? head.expanded(rows) : Tensor();
              out = head.forward(rows, expanded);
              if (keep) {
                kept = expanded.view({s.batch, s.height, s.width, expanded.size(1)})
                           .to(x.scalar_type());
              }
            });
  return {out.to(x.scalar_type()), kept};
}

std::vector<Tensor> pixel_head_backward(const c10::List<OptionalTensor>& output_grads,
                                        const Tensor& x, const Tensor& expand,
                                        const Tensor& expand_bias, const Tensor& grouped,
                                        const Tensor& grouped_bias, const Tensor& mix,
                                        const Tensor& mix_bias, const Tensor& project,
                                        const Tensor& project_bias, bool keep,
                                        at::TensorList saved,
                                        const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 10,
              "output_grads, output_mask: expected 1 and 10 entries");
  const Given weights{expand, expand_bias, grouped, grouped_bias, mix, mix_bias, project, project_bias};
  std::array<bool, 9> wanted{};
  for (int i = 0; i < 9; ++i) wanted[i] = output_mask[i];
  std::array<Tensor, 9> found;
  const OptionalTensor given = output_grads[0];
  if (given.has_value()) {
    with_head(x, weights, [&](const auto& head, const Sizes& s, const Tensor& rows) {
      Tensor expanded;
      if (keep) {
        const int64_t width = s.up * s.up * s.wide;
        TORCH_CHECK_VALUE(saved.size() == 1 && saved[0].numel() == rows.size(0) * width,
                          "saved: expected the first product's result");
        expanded = saved[0].to(rows.scalar_type()).view({rows.size(0), width});
      }
      found = head.backward(as_map(*given), rows, expanded, wanted);
      // Back from the layouts of products.
      const auto map = [&](Tensor& grad, at::IntArrayRef view, at::IntArrayRef order) {
        if (grad.defined()) grad = grad.view(view).permute(order);
      };
      map(found[0], {s.batch, s.height, s.width, s.ins}, {0, 3, 1, 2});
      map(found[1], {s.up, s.up, s.wide, s.ins}, {3, 2, 0, 1});
      map(found[3], {3, 3, s.half, 2}, {2, 3, 0, 1});
      map(found[5], {s.mixed, s.half, 1, 1}, {0, 1, 2, 3});
      map(found[7], {s.down, s.down, s.bands, s.mixed}, {3, 2, 0, 1});
      if (found[2].defined()) found[2] = found[2].view({-1, s.wide}).sum(0);
      if (found[8].defined()) found[8] = found[8].view({-1, s.bands}).sum(0);
    });
  }
  std::vector<Tensor> grads;
  for (int i = 0; i < 9; ++i) {
    if (!wanted[i]) continue;
    const Tensor& input = i == 0 ? x : weights[i - 1];
    grads.push_back(found[i].defined() ? laid_out(found[i], input) : at::zeros_like(input));
  }
  return grads;
}

}  // namespace
}  // namespace spectralx::cpu

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("pixel_head", &spectralx::cpu::pixel_head);
  m.impl("pixel_head_backward", &spectralx::cpu::pixel_head_backward);
}
