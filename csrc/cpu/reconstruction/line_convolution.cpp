// The convolution of channel_norm_conv2d without a map of what is convolved.
//
// Channels last, the pixels under the taps of one row of a kernel lie side by side: they are a row of
// a matrix whose next row starts a pixel on. So a line out is the sum of one product for each row of
// the kernel, [pixels, taps in] by [taps in, out], of lines that have just been normed and are in the
// cache; no pixel is copied but to norm it. Of a transposed convolution, whose pixels out meet
// different taps by their remainder by the stride, it is such a sum for each remainder. Backward, with
// the lines of the gradient in place of x's, is the same for the gradient of a line, and one product
// [in, pixels] by [pixels, taps out] for each row of the weight's gradient.
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

// Lines of a map at hand, each between margins of zeros, in a ring.
class Lines {
 public:
  Lines(int64_t held, int64_t left, int64_t width, int64_t right, int64_t channels)
      : held_(held), left_(left * channels), length_((left + width + right) * channels),
        store_(held * length_, 0.0f) {}

  float* at(int64_t line) { return store_.data() + line % held_ * length_ + left_; }

  // Nothing is at hand any more.
  void restart() { next_ = 0; }

  // make(line, values) for those of lines [first, last), at most `held`, that are not at hand.
  template <typename Make>
  void reach(int64_t first, int64_t last, const Make& make) {
    for (next_ = std::max(next_, first); next_ < last; ++next_) make(next_, at(next_));
  }

 private:
  int64_t held_, left_, length_, next_ = 0;
  std::vector<float> store_;
};

// run(task, first, last) for runs of `count` lines.
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
  // Taps of the same remainder side by side.
  std::vector<int64_t> order;
  int64_t left = 0, right = 0, above = 0, below = 0;
  for (const auto& phase : along_.phases) {
    const int64_t remainder = &phase - along_.phases.data(), taps = phase.taps.size();
    order.insert(order.end(), phase.taps.begin(), phase.taps.end());
    const int64_t pixels = (along_.out - remainder + along_.stride - 1) / along_.stride;
    left = std::max(left, -phase.first);
    right = std::max(right, pixels + phase.first + taps - 1 - along_.in);
  }
  for (const auto& phase : down_.phases) {
    above = std::min(above, phase.first);
    below = std::max<int64_t>(below, phase.first + phase.taps.size());
  }
  const Tensor weight = taps_.index_select(1, at::tensor(order, at::kLong)).contiguous();
  const Tensor offset = bias.has_value() ? bias->contiguous() : at::zeros({outs_}, x.options());
  const float *from = x.const_data_ptr<float>(), *taps = weight.const_data_ptr<float>(),
              *constant = offset.const_data_ptr<float>();
  float* to = data<float>(out);
  const int64_t bases = (down_.out + down_.stride - 1) / down_.stride, rows = batch_ * bases;
  for_runs(rows, (rows + kLines - 1) / kLines, [&](int64_t, int64_t first, int64_t last) {
    Lines lines(below - above, left, along_.in, right, ins_);
    std::vector<float> scratch(ins_);
    for (int64_t row = first; row < last; ++row) {
      const int64_t image = row / bases, base = row % bases;
      if (base == 0) lines.restart();
      lines.reach(std::max<int64_t>(base + above, 0), std::min(base + below, down_.in),
                  [&](int64_t line, float* values) {
                    head_kernels<float, float>().norm(
                        from + (image * down_.in + line) * along_.in * ins_, nullptr, along_.in,
                        by.norm, 1.0f, scratch.data(), values);
                  });
      for (int64_t y = base * down_.stride; y < std::min((base + 1) * down_.stride, down_.out); ++y) {
        float* line_out = to + (image * down_.out + y) * along_.out * outs_;
        for (int64_t pixel = 0; pixel < along_.out; ++pixel) {
          std::memcpy(line_out + pixel * outs_, constant, outs_ * sizeof(float));
        }
        const Axis::Phase& vertical = down_.phases[y % down_.stride];
        for (size_t v = 0; v < vertical.taps.size(); ++v) {
          const int64_t line = base + vertical.first + v;
          if (line < 0 || line >= down_.in) continue;
          const float* of_row = taps + vertical.taps[v] * along_.kernel * ins_ * outs_;
          for (int64_t remainder = 0; remainder < along_.stride; ++remainder) {
            const Axis::Phase& phase = along_.phases[remainder];
            const int64_t pixels = (along_.out - remainder + along_.stride - 1) / along_.stride;
            const int64_t depth = phase.taps.size() * ins_;
            if (pixels > 0 && depth > 0) {
              product(pixels, outs_, depth, lines.at(line) + phase.first * ins_, ins_, of_row,
                      outs_, line_out + remainder * outs_, along_.stride * outs_, true);
            }
            of_row += depth * outs_;
          }
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
  const Tensor ordered = transposed_ ? taps_ : taps_.flip({0, 1});
  const Tensor turned = ordered.transpose(2, 3).contiguous();  // [kernel, kernel, out, in]
  const int64_t rows = batch_ * down_.in, depth = along_.kernel * outs_, values = ins_ * depth;
  const int64_t most = std::max<int64_t>(kSums / (down_.kernel * values), 1);
  const int64_t tasks = std::min((rows + kLines - 1) / kLines, most);
  Tensor parts;
  if (wants_weight) parts = at::zeros({tasks, down_.kernel, ins_, along_.kernel, outs_}, x.options());
  std::vector<double> norm_parts(sums.defined() ? tasks * 2 * ins_ : 0, 0.0);
  const float *from = x.const_data_ptr<float>(), *from_grad = grad.const_data_ptr<float>(),
              *taps = turned.const_data_ptr<float>();
  const int64_t left = std::max<int64_t>(along_.reach, 0);
  const int64_t right = std::max<int64_t>(
      along_.stride * (along_.in - 1) - along_.reach + along_.kernel - along_.out, 0);
  for_runs(rows, tasks, [&](int64_t task, int64_t first, int64_t last) {
    Lines lines(down_.kernel, left, along_.out, right, outs_);
    const int64_t length = along_.in * ins_;
    std::vector<float> normed(wants_weight ? 2 * length : 0), back(inside ? length : 0);
    std::vector<float> scratch(3 * ins_), line_sums(2 * ins_);
    for (int64_t row = first; row < last; ++row) {
      const int64_t image = row / down_.in, place = row % down_.in;
      if (place == 0) lines.restart();
      const int64_t under = place * down_.stride - down_.reach;
      lines.reach(std::max<int64_t>(under, 0), std::min(under + down_.kernel, down_.out),
                  [&](int64_t line, float* to) {
                    const int64_t count = along_.out * outs_;
                    std::memcpy(to, from_grad + (image * down_.out + line) * count,
                                count * sizeof(float));
                  });
      const float* values_in = from + row * length;
      float* planes = normed.data() + length;
      if (wants_weight) {
        head_kernels<float, float>().norm(values_in, nullptr, along_.in, by.norm, 1.0f,
                                          scratch.data(), normed.data());
        line_kernels<float, float>().transpose(normed.data(), along_.in, ins_, ins_, along_.in,
                                               planes);
      }
      if (inside) std::fill(back.begin(), back.end(), 0.0f);
      for (int64_t v = 0; v < down_.kernel; ++v) {
        if (under + v < 0 || under + v >= down_.out) continue;
        const float* window = lines.at(under + v) - along_.reach * outs_;
        const int64_t step = along_.stride * outs_;
        if (inside) {
          product(along_.in, ins_, depth, window, step, taps + v * values, ins_, back.data(), ins_,
                  true);
        }
        if (wants_weight) {
          product(ins_, depth, along_.in, planes, along_.in, window, step,
                  data<float>(parts) + (task * down_.kernel + v) * values, depth, true);
        }
      }
      if (!inside) continue;
      std::fill(line_sums.begin(), line_sums.end(), 0.0f);
      float* to = sums.defined() ? line_sums.data() : nullptr;
      head_kernels<float, float>().norm_gradient(
          back.data(), values_in, along_.in, by.norm, scratch.data(),
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
