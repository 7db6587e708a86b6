// spectralx::gelu_grouped_conv2d on the CPU. Maths: spectralx_kernels/reconstruction/README.md.
//
// A strip of lines at a time goes through the first GELU, then each of its lines through the taps and the
// second. Backward keeps nothing but x and makes a strip again. A 3x3 convolution wants a line above and
// one below: `Window` keeps those that the next strip needs. Strips run in order and their sums are added
// in order.
#include "cpu/torch.h"

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "cpu/reconstruction/strips.h"

namespace spectralx::cpu {
namespace {

using namespace strips;
using OptionalTensor = std::optional<Tensor>;

template <typename S, typename A>
class GroupedConvolution {
 public:
  // x: channels last. weight [half, 2, 3, 3].
  GroupedConvolution(const Tensor& x, const Tensor& weight, const Tensor& bias)
      : x_(x), half_(weight.size(0)), lines_(x.size(2)), line_(x.size(3)),
        options_(x.options().memory_format(std::nullopt)) {
    const auto sums = sum_type(x.scalar_type());
    taps_ = taps_of(weight, sums), bias_ = bias.to(sums).contiguous();
    strip_ = std::clamp<int64_t>(kStripBytes / std::max<int64_t>(line_ * 2 * half_ * sizeof(S), 1), 1,
                                 std::max<int64_t>(lines_, 1));
  }

  Tensor forward() const {
    const Tensor out =
        at::empty({x_.size(0), half_, lines_, line_}, options_, kChannelsLast);
    for (int64_t image = 0; image < x_.size(0); ++image) {
      Window<S> hidden = window(2 * half_);
      for_strips(image, hidden, nullptr, [&](int64_t from, int64_t to) {
        for_lines(from, to, [&] { return std::vector<A>(half_); },
                  [&](int64_t line, std::vector<A>& scratch) {
                    group(hidden, line, scratch, data<S>(out) + place(image, line) * half_, nullptr);
                  });
      });
    }
    return out;
  }

  // Gradients of x, weight and bias, undefined where not wanted; that of the weight is [9, 2, half].
  std::array<Tensor, 3> backward(const Tensor& grad, const std::array<bool, 3>& wanted) const {
    std::array<Tensor, 3> found;
    if (wanted[0]) found[0] = at::empty(x_.sizes(), options_, kChannelsLast);
    if (wanted[1]) found[1] = at::zeros_like(taps_);
    if (wanted[2]) found[2] = at::zeros_like(bias_);
    const Tensor turned = taps_.flip({0});
    for (int64_t image = 0; image < x_.size(0); ++image) {
      Window<S> hidden = window(2 * half_), slope = window(2 * half_), back = window(half_);
      int64_t reached = 0;
      for_strips(image, hidden, wanted[0] ? &slope : nullptr, [&](int64_t from, int64_t to) {
        back.extend(to);
        for_lines(from, to, [&] { return Scratch(half_, line_); },
                  [&](int64_t line, Scratch& scratch) {
                    group(hidden, line, scratch.sums, scratch.out.data(), scratch.slope.data());
                    kernels().scaled_map(grad.const_data_ptr<S>() + place(image, line) * half_,
                                         scratch.slope.data(), line_ * half_, back.at(line));
                  });
        if (wanted[1]) {
          add_tap_gradients<S, A>(back, hidden, from, to, lines_, line_, half_, found[1]);
        }
        if (wanted[2]) add_rows(back.rows(from, to - from).view({-1, half_}), found[2]);
        const int64_t before = to == lines_ ? lines_ : std::max(to - 1, reached);
        if (wanted[0]) spread(image, back, slope, turned, reached, before, found[0]);
        reached = before;
        back.drop(reached - 1);
        slope.drop(reached);
      });
    }
    return found;
  }

 private:
  struct Scratch {
    std::vector<A> sums;
    std::vector<S> out, slope;

    Scratch(int64_t half, int64_t line) : sums(half), out(line * half), slope(line * half) {}
  };

  static const HeadKernels<S, A>& kernels() { return head_kernels<S, A>(); }

  Window<S> window(int64_t channels) const { return {strip_ + 3, line_ * channels, options_}; }

  // The first pixel of a line of an image.
  int64_t place(int64_t image, int64_t line) const { return (image * lines_ + line) * line_; }

  // use(from, to) for runs of an image's lines all around which `hidden` is at hand.
  template <typename Use>
  void for_strips(int64_t image, Window<S>& hidden, Window<S>* slope, const Use& use) const {
    int64_t from = 0;
    for (int64_t row = 0; row < lines_; row += strip_) {
      const int64_t end = std::min(row + strip_, lines_);
      hidden.extend(end);
      if (slope != nullptr) slope->extend(end);
      for_lines(row, end, [&] { return std::vector<A>(2 * half_); },
                [&](int64_t line, std::vector<A>& scratch) {
                  kernels().split_gelu(x_.const_data_ptr<S>() + place(image, line) * 2 * half_,
                                       line_, half_, scratch.data(), hidden.at(line),
                                       slope == nullptr ? nullptr : slope->at(line));
                });
      const int64_t to = end == lines_ ? lines_ : end - 1;
      if (to > from) use(from, to);
      hidden.drop(to - 1);
      from = to;
    }
  }

  void group(const Window<S>& hidden, int64_t line, std::vector<A>& scratch, S* out, S* slope) const {
    kernels().grouped(hidden.around(line, lines_).data(), line_, half_, 0, line_,
                      taps_.const_data_ptr<A>(), bias_.const_data_ptr<A>(), scratch.data(), half_, out,
                      slope);
  }

  void spread(int64_t image, const Window<S>& back, const Window<S>& slope, const Tensor& turned,
              int64_t first, int64_t last, const Tensor& to) const {
    for_lines(first, last, [&] { return std::vector<A>(2 * half_); },
              [&](int64_t line, std::vector<A>& scratch) {
                kernels().spread(back.around(line, lines_).data(), line_, half_,
                                 turned.const_data_ptr<A>(), slope.at(line), line_, 0, scratch.data(),
                                 data<S>(to) + place(image, line) * 2 * half_);
              });
  }

  const Tensor& x_;
  int64_t half_, lines_, line_, strip_;
  at::TensorOptions options_;
  Tensor taps_, bias_;
};

void check(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == 2 && weight.size(2) == 3 &&
                        weight.size(3) == 3,
                    "weight: got shape ", weight.sizes(), ", expected [channels, 2, 3, 3]");
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == 2 * weight.size(0), "x: got shape ", x.sizes(),
                    ", expected [batch, ", 2 * weight.size(0), ", height, width]");
  TORCH_CHECK_VALUE(bias.numel() == weight.size(0), "bias: got ", bias.numel(),
                    " values, expected ", weight.size(0));
}

Tensor gelu_grouped_conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check(x, weight, bias);
  const Tensor map = as_map(x);
  Tensor out;
  SPECTRALX_DISPATCH(map.scalar_type(),
                     [&] { out = GroupedConvolution<S, A>(map, weight, bias).forward(); });
  return out.to(x.scalar_type());
}

std::vector<Tensor> gelu_grouped_conv2d_backward(const c10::List<OptionalTensor>& output_grads,
                                                 const Tensor& x, const Tensor& weight,
                                                 const Tensor& bias, at::TensorList /*saved*/,
                                                 const c10::List<bool>& mask) {
  TORCH_CHECK(output_grads.size() == 1 && mask.size() == 3,
              "output_grads, output_mask: expected 1 and 3 entries");
  check(x, weight, bias);
  const std::array<bool, 3> wanted{mask[0], mask[1], mask[2]};
  std::array<Tensor, 3> found;
  const OptionalTensor given = output_grads[0];
  if (given.has_value()) {
    const Tensor map = as_map(x), grad = as_map(*given);
    SPECTRALX_DISPATCH(map.scalar_type(), [&] {
      found = GroupedConvolution<S, A>(map, weight, bias).backward(grad, wanted);
    });
    if (wanted[1]) found[1] = weight_of_taps(found[1]);
  }
  const std::array<const Tensor*, 3> inputs{&x, &weight, &bias};
  std::vector<Tensor> grads;
  for (int i = 0; i < 3; ++i) {
    if (!wanted[i]) continue;
    grads.push_back(found[i].defined() ? laid_out(found[i], *inputs[i]) : at::zeros_like(*inputs[i]));
  }
  return grads;
}

}  // namespace
}  // namespace spectralx::cpu

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("gelu_grouped_conv2d", &spectralx::cpu::gelu_grouped_conv2d);
  m.impl("gelu_grouped_conv2d_backward", &spectralx::cpu::gelu_grouped_conv2d_backward);
}
