// The convolution of channel_norm_conv2d without a map of what is convolved.
//
// Lines that have just been normed are turned to planes, [in][pixels] between margins of zeros, and stay
// in the cache. There a tap is a product [out, in] by [in, pixels] that begins as many pixels on as the
// tap lies aside, so that pixels fill the vectors whatever the number of channels; a line out is their
// sum. Of a transposed convolution, whose pixels out meet different taps by their remainder by the
// stride, it is such a sum for each remainder. Backward, with lines of the gradient in place of x's, is
// the same for the gradient of a line. Gradients of weights take the gradient's lines channels last,
// where the pixels under the taps of one row lie side by side: one product [in, pixels] by
// [pixels, taps out] for each row of the kernel.
//
// Tasks go down fixed runs of lines, and their sums are joined in order: the bits do not depend on the
// number of threads.
#include "cpu/torch.h"

#include "cpu/reconstruction/line_convolution.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/common/product.h"

namespace spectralx::cpu {

using at::Tensor;

namespace {

constexpr int64_t kLines = 32;          // of a task; forward norms those beside them once more
constexpr int64_t kWidth = 32;          // pixels of a line from which on products are worth it
constexpr int64_t kSums = 1 << 24;      // values of weights' gradients that tasks hold together
constexpr int64_t kWeights = 1 << 18;   // values of a weight that stays in the cache

// Lines of a map at hand, in a ring; what is not written of a line is 0.
class Lines {
 public:
  Lines(int64_t held, int64_t length) : held_(held), length_(length), store_(held * length, 0.0f) {}

  float* at(int64_t line) { return store_.data() + line % held_ * length_; }

  // Nothing is at hand any more.
  void restart() { next_ = 0; }

  // make(line, values) for those of lines [first, last), at most `held`, that are not at hand.
  template <typename Make>
  void reach(int64_t first, int64_t last, const Make& make) {
    for (next_ = std::max(next_, first); next_ < last; ++next_) make(next_, at(next_));
  }

 private:
  int64_t held_, length_, next_ = 0;
  std::vector<float> store_;
};

// A line [pixels, channels] normed and turned to planes [channels][plane] from `to` on. `straight` holds
// a line, `scratch` a pixel.
void norm_planes(const float* line, int64_t pixels, const RowNorm<float>& norm, float* straight,
                 float* scratch, int64_t plane, float* to) {
  head_kernels<float, float>().norm(line, nullptr, pixels, norm, 1.0f, scratch, straight);
  line_kernels<float, float>().transpose(straight, pixels, norm.channels, norm.channels, plane, to);
}

// run(task, first, last): each task a run of the lines [0, count).
template <typename Run>
void for_runs(int64_t count, int64_t tasks, const Run& run) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      run(task, task * count / tasks, (task + 1) * count / tasks);
    }
    end_products();
  });
}

}  // namespace

int64_t LineConvolution::Axis::size_out(int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                                        bool transposed) {
  return transposed ? (in - 1) * stride - 2 * padding + kernel : in + 2 * padding - kernel + 1;
}

LineConvolution::Axis::Axis(int64_t in, int64_t kernel, int64_t stride, int64_t padding,
                            bool transposed)
    : in(in), out(size_out(in, kernel, stride, padding, transposed)), kernel(kernel), stride(stride),
      reach(transposed ? padding : kernel - 1 - padding) {
  for (int64_t remainder = 0; remainder < stride; ++remainder) {
    Phase phase{transposed ? 0 : -padding, {}};
    for (int64_t t = 0; t < kernel; ++t) {
      const int64_t tap = transposed ? kernel - 1 - t : t, place = remainder + padding - tap;
      if (transposed && place % stride != 0) continue;
      if (transposed && phase.taps.empty()) phase.first = place / stride;
      phase.taps.push_back(tap);
    }
    phases.push_back(std::move(phase));
  }
}

bool LineConvolution::takes(const Tensor& x, const Tensor& weight, bool transposed,
                            at::IntArrayRef stride, at::IntArrayRef padding) {
  if (x.scalar_type() != at::kFloat || !multiplies_tiles() || x.numel() == 0) return false;
  if (weight.numel() == 0 || weight.numel() > kWeights || x.size(3) < kWidth) return false;
  for (int64_t i = 0; i < 2; ++i) {
    if (padding[i] < 0 || stride[i] < 1 || (stride[i] != 1 && !transposed)) return false;
    if (Axis::size_out(x.size(2 + i), weight.size(2 + i), stride[i], padding[i], transposed) < 1) {
      return false;
    }
  }
  return true;
}

LineConvolution::LineConvolution(const Tensor& x, const Tensor& weight, bool transposed,
                                 at::IntArrayRef stride, at::IntArrayRef padding)
    : batch_(x.size(0)), ins_(x.size(1)), outs_(weight.size(transposed ? 1 : 0)),
      down_(x.size(2), weight.size(2), stride[0], padding[0], transposed),
      along_(x.size(3), weight.size(3), stride[1], padding[1], transposed), transposed_(transposed),
      taps_(transposed ? weight.permute({2, 3, 0, 1}) : weight.permute({2, 3, 1, 0})) {}

Tensor LineConvolution::forward(const Tensor& x, const ChannelNorm& norm,
                                const std::optional<Tensor>& bias) const {
  const NormParameters<float> by(norm, ins_);
  const Tensor out = at::empty({batch_, outs_, down_.out, along_.out}, x.options(), kChannelsLast);
  const Tensor turned = taps_.transpose(2, 3).contiguous();  // [kernel, kernel, out, in]
  const Tensor offset = bias.has_value() ? bias->contiguous() : at::zeros({outs_}, x.options());
  const float *from = x.const_data_ptr<float>(), *taps = turned.const_data_ptr<float>(),
              *constant = offset.const_data_ptr<float>();
  float* to = data<float>(out);
  int64_t left = 0, right = 0, above = 0, below = 0;
  for (int64_t remainder = 0; remainder < along_.stride; ++remainder) {
    const Axis::Phase& phase = along_.phases[remainder];
    left = std::max(left, -phase.first);
    right = std::max(right, along_.places(remainder) + phase.last() - along_.in);
  }
  for (const Axis::Phase& phase : down_.phases) {
    above = std::min(above, phase.first);
    below = std::max(below, phase.last() + 1);
  }
  const int64_t plane = left + along_.in + right;
  const int64_t bases = down_.places(0), rows = batch_ * bases;
  for_runs(rows, (rows + kLines - 1) / kLines, [&](int64_t, int64_t first, int64_t last) {
    Lines lines(below - above, ins_ * plane);
    std::vector<float> normed(along_.in * ins_), sums(along_.places(0) * outs_), scratch(ins_);
    for (int64_t row = first; row < last; ++row) {
      const int64_t image = row / bases, base = row % bases;
      if (base == 0) lines.restart();
      lines.reach(std::max<int64_t>(base + above, 0), std::min(base + below, down_.in),
                  [&](int64_t line, float* planes) {
                    norm_planes(from + (image * down_.in + line) * along_.in * ins_, along_.in,
                                by.norm, normed.data(), scratch.data(), plane, planes + left);
                  });
      for (int64_t y = base * down_.stride; y < std::min((base + 1) * down_.stride, down_.out); ++y) {
        const Axis::Phase& vertical = down_.phases[y % down_.stride];
        for (int64_t remainder = 0; remainder < along_.stride; ++remainder) {
          const Axis::Phase& phase = along_.phases[remainder];
          const int64_t pixels = along_.places(remainder);
          if (pixels == 0) continue;
          for (int64_t channel = 0; channel < outs_; ++channel) {
            std::fill_n(sums.data() + channel * pixels, pixels, constant[channel]);
          }
          for (size_t v = 0; v < vertical.taps.size(); ++v) {
            const int64_t line = base + vertical.first + v;
            if (line < 0 || line >= down_.in) continue;
            for (size_t t = 0; t < phase.taps.size(); ++t) {
              const int64_t tap = vertical.taps[v] * along_.kernel + phase.taps[t];
              product(outs_, pixels, ins_, taps + tap * outs_ * ins_, ins_,
                      lines.at(line) + left + phase.first + t, plane, sums.data(), pixels, true);
            }
          }
          line_kernels<float, float>().transpose(
              sums.data(), outs_, pixels, pixels, along_.stride * outs_,
              to + ((image * down_.out + y) * along_.out + remainder) * outs_);
        }
      }
    }
  });
  return out;
}

Tensor LineConvolution::backward(const Tensor& grad, const Tensor& x, const ChannelNorm& norm,
                                 const Tensor& x_grad, const Tensor& sums, bool wants_weight) const {
  const NormParameters<float> by(norm, ins_);
  const bool inside = x_grad.defined() || sums.defined();
  const Tensor ordered = (transposed_ ? taps_ : taps_.flip({0, 1})).contiguous();
  const int64_t rows = batch_ * down_.in, depth = along_.kernel * outs_, values = ins_ * depth;
  const int64_t most = std::max<int64_t>(kSums / (down_.kernel * values), 1);
  const int64_t tasks = std::min((rows + kLines - 1) / kLines, most);
  Tensor parts;
  if (wants_weight) parts = at::zeros({tasks, down_.kernel, ins_, along_.kernel, outs_}, x.options());
  std::vector<double> norm_parts(sums.defined() ? tasks * 2 * ins_ : 0, 0.0);
  const float *from = x.const_data_ptr<float>(), *from_grad = grad.const_data_ptr<float>(),
              *taps = ordered.const_data_ptr<float>();
  // A line of the gradient is kept channels last, for the weight, and in planes by remainder.
  const int64_t stride = along_.stride, places = along_.places(0);
  const int64_t before = std::max<int64_t>(along_.reach, 0);
  const int64_t behind = std::max<int64_t>(
      stride * (along_.in - 1) - along_.reach + along_.kernel - along_.out, 0);
  const int64_t window = wants_weight ? (before + along_.out + behind) * outs_ : 0;
  const int64_t left = (before + stride - 1) / stride;
  const int64_t right = std::max<int64_t>(along_.in + along_.place(along_.kernel - 1) - places, 0);
  const int64_t plane = left + places + right, planes = inside ? stride * outs_ * plane : 0;
  for_runs(rows, tasks, [&](int64_t task, int64_t first, int64_t last) {
    Lines lines(down_.kernel, window + planes);
    const int64_t length = along_.in * ins_;
    std::vector<float> straight(length), turned(length), scratch(3 * ins_), line_sums(2 * ins_);
    for (int64_t row = first; row < last; ++row) {
      const int64_t image = row / down_.in, place = row % down_.in;
      if (place == 0) lines.restart();
      const int64_t under = place * down_.stride - down_.reach;
      lines.reach(std::max<int64_t>(under, 0), std::min(under + down_.kernel, down_.out),
                  [&](int64_t line, float* to) {
                    const int64_t count = along_.out * outs_;
                    const float* of_line = from_grad + (image * down_.out + line) * count;
                    if (wants_weight) {
                      std::memcpy(to + before * outs_, of_line, count * sizeof(float));
                    }
                    for (int64_t remainder = 0; inside && remainder < stride; ++remainder) {
                      line_kernels<float, float>().transpose(
                          of_line + remainder * outs_, along_.places(remainder), outs_,
                          stride * outs_, plane, to + window + remainder * outs_ * plane + left);
                    }
                  });
      const float* line_in = from + row * length;
      const auto for_rows = [&](const auto& use) {
        for (int64_t v = 0; v < down_.kernel; ++v) {
          if (under + v >= 0 && under + v < down_.out) use(v, lines.at(under + v));
        }
      };
      if (wants_weight) {
        norm_planes(line_in, along_.in, by.norm, straight.data(), scratch.data(), along_.in,
                    turned.data());
        for_rows([&](int64_t v, const float* line) {
          product(ins_, depth, along_.in, turned.data(), along_.in,
                  line + (before - along_.reach) * outs_, stride * outs_,
                  data<float>(parts) + (task * down_.kernel + v) * values, depth, true);
        });
      }
      if (!inside) continue;
      std::fill(turned.begin(), turned.end(), 0.0f);
      for_rows([&](int64_t v, const float* line) {
        for (int64_t tap = 0; tap < along_.kernel; ++tap) {
          const int64_t shift = along_.place(tap);
          const int64_t remainder = tap - along_.reach - stride * shift;
          product(ins_, along_.in, outs_, taps + (v * along_.kernel + tap) * ins_ * outs_, outs_,
                  line + window + remainder * outs_ * plane + left + shift, plane, turned.data(),
                  along_.in, true);
        }
      });
      line_kernels<float, float>().transpose(turned.data(), ins_, along_.in, along_.in, ins_,
                                             straight.data());
      std::fill(line_sums.begin(), line_sums.end(), 0.0f);
      float* to = sums.defined() ? line_sums.data() : nullptr;
      head_kernels<float, float>().norm_gradient(
          straight.data(), line_in, along_.in, by.norm, scratch.data(),
          x_grad.defined() ? data<float>(x_grad) + row * length : nullptr, to,
          to == nullptr ? nullptr : to + ins_);
      for (size_t i = 0; sums.defined() && i < line_sums.size(); ++i) {
        norm_parts[task * 2 * ins_ + i] += line_sums[i];
      }
    }
  });
  for (size_t i = 0; i < norm_parts.size(); ++i) {
    data<double>(sums)[i % (2 * ins_)] += norm_parts[i];
  }
  if (!wants_weight) return Tensor();
  Tensor total = parts[0].clone();
  for (int64_t task = 1; task < tasks; ++task) total.add_(parts[task]);
  total = total.transpose(1, 2);  // [kernel, kernel, in, out]
  return transposed_ ? total.permute({2, 3, 0, 1}) : total.flip({0, 1}).permute({3, 2, 0, 1});
}

}  // namespace spectralx::cpu
