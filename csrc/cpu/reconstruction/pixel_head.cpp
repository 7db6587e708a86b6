// spectralx::pixel_head on the CPU. Maths: spectralx_kernels/reconstruction/README.md.
//
// A map of 4 h x 4 w pixels is several times the size of what comes in. It is made a strip at a time,
// from the first convolution to the last: a strip's first product and GELU, then a line from the 3x3
// convolution to the pixels while it is in a core's cache. Backward makes strips again, but for the
// first product's result where the caller keeps that, and of their lines those pixels alone whose
// gradient is not zero: a loss of masked patches leaves out the others. A strip goes as far as the
// lines at hand allow, since a 3x3 convolution wants a line above and one below; `Window` keeps those
// that the next strip needs. Strips run in order and their sums are added in order.
//
// h x w: what comes in; k, the first stride: k h x k w, the lines; last stride: pixels.
#include "cpu/torch.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/linear.h"
#include "cpu/common/operand_type.h"
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
      Window<S> hidden = window(s_.wide);
      int64_t from = 0;
      for (int64_t row = 0; row < s_.height; row += s_.strip) {
        const int64_t end = std::min(row + s_.strip, s_.height);
        expand(x, expanded, image, row, end, hidden, nullptr);
        const int64_t to = end == s_.height ? s_.lines : end * s_.up - 1;
        if (to <= from) continue;
        for_lines(from, to, [&] { return Scratch(s_); }, [&](int64_t line, Scratch& scratch) {
          group(hidden, line, 0, s_.line, scratch, scratch.half.data(), nullptr);
          mix(scratch.half.data(), s_.line, scratch, scratch.mixed.data(), nullptr);
          multiply(scratch.mixed.data(), s_.line, s_.mixed, w_.project, s_.points, scratch);
          const A* values = scratch.sums.data();
          for_pixels(image, line, [&](int64_t pixel, int64_t part, int64_t at, int64_t count) {
            kernels().biased(values + pixel * s_.points + part,
                             w_.project_bias.const_data_ptr<A>() + part, count, data<S>(out) + at);
          });
        });
        hidden.drop(to - 1);
        from = to;
      }
    }
    return out;
  }

  // Gradients by the order of the schema, undefined where not wanted. grad: channels last; those of
  // weights lie as `Weights` has them, [out, in].
  std::array<Tensor, 9> backward(const Tensor& grad, const Tensor& x, const Tensor& expanded,
                                 const std::array<bool, 9>& wanted) const {
    std::array<Tensor, 9> found;
    const auto sums = options_.dtype(sum_type(options_.dtype().toScalarType()));
    const std::array<std::vector<int64_t>, 9> shapes{{{},
                                                      w_.expand.sizes().vec(),
                                                      w_.expand_bias.sizes().vec(),
                                                      w_.taps.sizes().vec(),
                                                      w_.taps_bias.sizes().vec(),
                                                      {s_.mixed, s_.half},
                                                      {s_.mixed},
                                                      {s_.points, s_.mixed},
                                                      {s_.points}}};
    for (int i = 1; i < 9; ++i) {
      if (wanted[i]) found[i] = at::zeros(shapes[i], sums);
    }
    if (wanted[0]) found[0] = at::empty_like(x);
    const auto any = [&](int stages) {
      return std::any_of(wanted.begin(), wanted.begin() + stages, [](bool want) { return want; });
    };
    const Backward to{wanted, any(3), any(5), any(7), wanted[0] ? turned(w_.expand) : Tensor(),
                      w_.taps.flip({0})};
    Rows rows(s_, options_);
    for (int64_t image = 0; image < s_.batch; ++image) {
      backward_of(image, grad, x, expanded, to, rows, found);
    }
    return found;
  }

 private:
  using Scratch = strips::Scratch<S, A>;

  // What of backward is wanted: anything before the 3x3 convolution, up to it, up to `mix`.
  struct Backward {
    std::array<bool, 9> wanted;
    bool expand, group, mix;
    Tensor expand_turned, flipped;
  };

  void backward_of(int64_t image, const Tensor& grad, const Tensor& x, const Tensor& expanded,
                   const Backward& to, Rows& rows, std::array<Tensor, 9>& found) const {
    const std::array<bool, 9>& wanted = to.wanted;
    Window<S> hidden = window(s_.wide), slope = window(s_.wide), back = window(s_.half);
    Window<S> wide(s_.strip + 2, s_.up * s_.line * s_.wide, options_);
    // Lines whose gradient is known behind the 3x3 convolution and before it; rows of x.
    int64_t known = 0, reached = 0, finished = 0;
    for (int64_t row = 0; row < s_.height; row += s_.strip) {
      const int64_t end = std::min(row + s_.strip, s_.height);
      const bool last = end == s_.height;
      expand(x, expanded, image, row, end, hidden, to.expand ? &slope : nullptr);
      const int64_t next = last ? s_.lines : end * s_.up - 1;
      if (next == known) continue;
      choose(grad, image, known, next, rows);
      back.extend(next);
      for_lines(known, next, [&] { return Scratch(s_); }, [&](int64_t line, Scratch& scratch) {
        backward_line(grad, image, line, line - known, hidden, to, scratch, rows, back);
      });
      const auto add = [&](int weight, const Tensor& from, int64_t outs, const Tensor& in,
                           int64_t ins) {
        if (rows.count() == 0) return;
        const Tensor of = rows.of(from, outs);
        if (wanted[weight]) found[weight].add_(weight_gradient(of, rows.of(in, ins)));
        if (wanted[weight + 1]) add_rows(of, found[weight + 1]);
      };
      add(7, rows.out_grad, s_.points, rows.mixed, s_.mixed);
      add(5, rows.mixed_grad, s_.mixed, rows.half, s_.half);
      if (wanted[3]) {
        add_tap_gradients<S, A>(back, hidden, known, next, s_.lines, s_.line, s_.half, found[3]);
      }
      if (wanted[4]) add_rows(back.rows(known, next - known).view({-1, s_.half}), found[4]);
      known = next;
      hidden.drop(known - 1);
      if (!to.expand) {
        back.drop(known);
        continue;
      }
      const int64_t before = last ? s_.lines : std::max(known - 1, reached);
      wide.extend((before + s_.up - 1) / s_.up);
      spread(back, slope, to.flipped, reached, before, wide);
      reached = before;
      back.drop(reached - 1);
      slope.drop(reached);
      const int64_t done = reached / s_.up;
      const int64_t first = (image * s_.height + finished) * s_.width;
      if (done == finished) continue;
      const int64_t count = (done - finished) * s_.width;
      const Tensor wide_grad =
          wide.rows(finished, done - finished).view({count, w_.expand.size(0)});
      if (wanted[1]) found[1].add_(at::mm(wide_grad.t(), x.narrow(0, first, count)));
      if (wanted[2]) add_rows(wide_grad, found[2]);
      if (wanted[0]) {
        found[0].narrow(0, first, count).copy_(input_gradient(wide_grad, to.expand_turned));
      }
      finished = done;
      wide.drop(finished);
    }
  }

  static const HeadKernels<S, A>& kernels() { return head_kernels<S, A>(); }

  // Of lines with so many channels.
  Window<S> window(int64_t channels) const {
    return {s_.strip * s_.up + 4, s_.line * channels, options_};
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
    for_lines(row * s_.up, end * s_.up, [&] { return std::vector<A>(s_.wide); },
              [&](int64_t line, std::vector<A>& scratch) {
                const S* values =
                    made.const_data_ptr<S>() +
                    ((line / s_.up - row) * s_.width * s_.up + line % s_.up) * chunk;
                for (int64_t pixel = 0; pixel < s_.width; ++pixel) {
                  kernels().split_gelu(values + pixel * s_.up * chunk, s_.up, s_.half,
                                       scratch.data(), hidden.at(line) + pixel * chunk,
                                       slope == nullptr ? nullptr : slope->at(line) + pixel * chunk);
                }
              });
  }

  // Rows of GELU of the 3x3 convolution at pixels [first, last) of a line, and of its derivative.
  void group(const Window<S>& hidden, int64_t line, int64_t first, int64_t last, Scratch& scratch,
             S* out, S* slope) const {
    kernels().grouped(hidden.around(line, s_.lines).data(), s_.line, s_.half, first, last,
                      w_.taps.const_data_ptr<A>(), w_.taps_bias.const_data_ptr<A>(),
                      scratch.taps.data(), even(s_.half), out, slope);
  }

  // scratch.sums [rows, outs] = x [rows, even(ins)] times `weight`.
  void multiply(const S* x, int64_t rows, int64_t ins, const Tensor& weight, int64_t outs,
                Scratch& scratch) const {
    product(rows, outs, even(ins), x, even(ins), weight.const_data_ptr<S>(), outs,
            scratch.sums.data(), outs, false);
  }

  // GELU of the 1x1 convolution, and its derivative there.
  void mix(const S* half, int64_t rows, Scratch& scratch, S* out, S* slope) const {
    multiply(half, rows, s_.half, w_.mix, s_.mixed, scratch);
    kernels().biased_gelu(scratch.sums.data(), w_.mix_bias.const_data_ptr<A>(), rows, s_.mixed,
                          even(s_.mixed), out, slope);
  }

  // The pixels of lines [first, last) any of whose gradients is not 0.
  void choose(const Tensor& grad, int64_t image, int64_t first, int64_t last, Rows& rows) const {
    const S* values = grad.const_data_ptr<S>();
    rows.pixels.assign(last - first, {});
    at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      std::vector<char> there(s_.line);
      for (int64_t line = begin; line < end; ++line) {
        std::fill(there.begin(), there.end(), 0);
        for_pixels(image, line, [&](int64_t pixel, int64_t, int64_t at, int64_t count) {
          bool any = false;
          for (int64_t i = at; i < at + count; ++i) any |= values[i] != S(0);
          there[pixel] |= any;
        });
        for (int64_t pixel = 0; pixel < s_.line; ++pixel) {
          if (there[pixel]) rows.pixels[line - first].push_back(pixel);
        }
      }
    });
    rows.first.assign(1, 0);
    for (const auto& pixels : rows.pixels) rows.first.push_back(rows.count() + pixels.size());
  }

  // From the gradient of a line's pixels to that of its 3x3 convolution, in `back`; `place`: of the line
  // in `rows`, which are filled.
  void backward_line(const Tensor& grad, int64_t image, int64_t line, int64_t place,
                     const Window<S>& hidden, const Backward& to, Scratch& scratch, const Rows& rows,
                     const Window<S>& back) const {
    const std::vector<int64_t>& pixels = rows.pixels[place];
    const int64_t count = pixels.size();
    const auto row = [&](const Tensor& all, int64_t i) {
      return data<S>(all) + (rows.first[place] + i) * all.size(1);
    };
    if (to.group) std::fill_n(back.at(line), s_.line * s_.half, S(0));
    if (count == 0) return;
    for (int64_t i = 0, end; i < count; i = end) {
      for (end = i + 1; end < count && pixels[end] == pixels[end - 1] + 1;) ++end;
      group(hidden, line, pixels[i], pixels[end - 1] + 1, scratch, row(rows.half, i),
            to.group ? row(rows.half_slope, i) : nullptr);
    }
    mix(row(rows.half, 0), count, scratch, row(rows.mixed, 0),
        to.mix ? scratch.slope.data() : nullptr);
    const S* values = grad.const_data_ptr<S>();
    const int64_t chunk = s_.down * s_.bands;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t y = 0; y < s_.down; ++y) {
        const int64_t at = ((image * s_.lines + line) * s_.down + y) * s_.line + pixels[i];
        std::memcpy(row(rows.out_grad, i) + y * chunk, values + at * chunk, chunk * sizeof(S));
      }
    }
    if (!to.mix) return;
    multiply(row(rows.out_grad, 0), count, s_.points, w_.project_back, s_.mixed, scratch);
    for (int64_t i = 0; i < count; ++i) {
      kernels().scaled(scratch.sums.data() + i * s_.mixed, scratch.slope.data() + i * s_.mixed,
                       s_.mixed, row(rows.mixed_grad, i));
    }
    if (!to.group) return;
    multiply(row(rows.mixed_grad, 0), count, s_.mixed, w_.mix_back, s_.half, scratch);
    for (int64_t i = 0; i < count; ++i) {
      kernels().scaled(scratch.sums.data() + i * s_.half, row(rows.half_slope, i), s_.half,
                       back.at(line) + pixels[i] * s_.half);
    }
  }

  // Lines [first, last) of the gradient before the first GELU, as the first product made them.
  void spread(const Window<S>& back, const Window<S>& slope, const Tensor& taps, int64_t first,
              int64_t last, const Window<S>& wide) const {
    const int64_t chunk = s_.up * s_.wide;
    for_lines(first, last, [&] { return std::vector<A>(s_.wide); },
              [&](int64_t line, std::vector<A>& scratch) {
                kernels().spread(back.around(line, s_.lines).data(), s_.line, s_.half,
                                 taps.const_data_ptr<A>(), slope.at(line), s_.up, s_.up * chunk,
                                 scratch.data(),
                                 wide.at(line / s_.up) + line % s_.up * chunk);
              });
  }

  // use(pixel of the line, first of its values [down down bands], where they lie in the map, how many)
  // for every run of values of a line's pixels that lie side by side in the map.
  template <typename Use>
  void for_pixels(int64_t image, int64_t line, const Use& use) const {
    const int64_t chunk = s_.down * s_.bands;
    for (int64_t y = 0; y < s_.down; ++y) {
      const int64_t at = ((image * s_.lines + line) * s_.down + y) * s_.line * chunk;
      for (int64_t x = 0; x < s_.line; ++x) use(x, y * chunk, at + x * chunk, chunk);
    }
  }

  const Sizes& s_;
  const Weights& w_;
  at::TensorOptions options_;
};

using Given = std::array<Tensor, 8>;

template <typename Run>
void with_head(const Tensor& x, const Given& weights, const Run& run) {
  const auto type = operand_type(x);
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
      found = head.backward(as_map(given->to(rows.scalar_type())), rows, expanded, wanted);
      // Back from the layouts of products.
      const auto map = [&](Tensor& grad, at::IntArrayRef view, at::IntArrayRef order) {
        if (grad.defined()) grad = grad.view(view).permute(order);
      };
      map(found[0], {s.batch, s.height, s.width, s.ins}, {0, 3, 1, 2});
      map(found[1], {s.up, s.up, s.wide, s.ins}, {3, 2, 0, 1});
      if (found[3].defined()) found[3] = weight_of_taps(found[3]);
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
