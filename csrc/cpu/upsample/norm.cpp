// spectralx::channel_moments and batch_norm_relu on the CPU. Maths: spectralx_kernels/upsample/README.md.
//
// Channels last: a part is a fixed run of pixels. Sums over pixels are formed by part, each part on one
// thread, and joined in order, so results do not depend on the number of threads.
#include "cpu/torch.h"

#include "cpu/upsample/norm.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace spectralx::cpu {
namespace {

using at::Tensor;

constexpr int64_t kPixels = 64;  // of a part

int64_t parts_of(int64_t pixels) { return (pixels + kPixels - 1) / kPixels; }

// use(part, first pixel, pixels), in any order.
template <typename Use>
void for_parts(int64_t pixels, const Use& use) {
  at::parallel_for(0, parts_of(pixels), 4, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      use(part, part * kPixels, std::min(kPixels, pixels - part * kPixels));
    }
  });
}

// The type that the kernels read a map in.
at::ScalarType read_type(at::ScalarType type) { return type == at::kHalf ? at::kFloat : type; }

int64_t pixels_of(const Tensor& map) { return map.size(0) * map.size(2) * map.size(3); }

template <typename A>
Tensor merged(const Tensor& parts, int64_t each, int64_t count) {
  const int64_t channels = parts.size(2);
  std::vector<double> means(channels), squares(channels);
  for (int64_t part = 0; part < parts.size(0); ++part) {
    const double before = static_cast<double>(part * each);
    const double n = static_cast<double>(std::min(each, count - part * each));
    const A* mean = parts.const_data_ptr<A>() + part * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = mean[c] - means[c];
      means[c] += delta * (n / (before + n));
      squares[c] += mean[channels + c] + delta * delta * (before * n / (before + n));
    }
  }
  Tensor moments = at::empty({2, channels}, parts.options());
  for (int64_t c = 0; c < channels; ++c) {
    data<A>(moments)[c] = static_cast<A>(means[c]);
    data<A>(moments)[channels + c] =
        static_cast<A>(squares[c] / static_cast<double>(std::max<int64_t>(count, 1)));
  }
  return moments;
}

}  // namespace

Tensor merged_moments(const Tensor& parts, int64_t each, int64_t count) {
  return parts.scalar_type() == at::kDouble ? merged<double>(parts, each, count)
                                            : merged<float>(parts, each, count);
}

Tensor moments_of(const Tensor& map) {
  TORCH_CHECK(map.dim() == 4, "x: got ", map.dim(), " dimensions, expected 4");
  const auto type = read_type(map.scalar_type());
  const int64_t pixels = pixels_of(map), channels = map.size(1);
  const Tensor parts =
      at::empty({parts_of(pixels), 2, channels}, map.options().dtype(sum_type(type)));
  SPECTRALX_DISPATCH(type, [&] {
    const Tensor x = channels_last<S, A>(map.to(type));
    for_parts(pixels, [&](int64_t part, int64_t first, int64_t count) {
      A* to = data<A>(parts) + part * 2 * channels;
      line_kernels<S, A>().moments(x.const_data_ptr<S>() + first * channels, count, channels,
                                   channels, to, to + channels);
    });
  });
  return merged_moments(parts, kPixels, pixels);
}

namespace {

// By channel: what is taken off, what the rest is multiplied by, what is added.
template <typename A>
struct Channels {
  std::vector<A> mean, scale, bias, rstd;

  Channels(const Tensor& moments, const std::optional<Tensor>& weight,
           const std::optional<Tensor>& offset, double eps) {
    const int64_t channels = moments.size(1);
    const auto type = c10::CppTypeToScalarType<A>::value;
    const Tensor found = moments.to(type).contiguous();
    const A* from = found.const_data_ptr<A>();
    mean.assign(from, from + channels);
    rstd.resize(channels);
    for (int64_t c = 0; c < channels; ++c) {
      rstd[c] = static_cast<A>(1 / std::sqrt(static_cast<double>(from[channels + c]) + eps));
    }
    scale = rstd;
    bias.resize(channels);
    const auto each = [&](const std::optional<Tensor>& given, const auto& use) {
      if (!given.has_value()) return;
      const Tensor values = given->to(type).contiguous();
      for (int64_t c = 0; c < channels; ++c) use(c, values.const_data_ptr<A>()[c]);
    };
    each(weight, [&](int64_t c, A value) { scale[c] *= value; });
    each(offset, [&](int64_t c, A value) { bias[c] = value; });
  }
};

void check(const Tensor& x, const Tensor& moments) {
  TORCH_CHECK(x.dim() == 4, "x: got ", x.dim(), " dimensions, expected 4");
  TORCH_CHECK(moments.sizes() == at::IntArrayRef({2, x.size(1)}), "moments: got shape ",
              moments.sizes(), ", expected [2, ", x.size(1), "]");
}

Tensor batch_norm_relu(const Tensor& x, const Tensor& moments, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, double eps, bool relu, bool batch) {
  check(x, moments);
  const auto format = format_of(x);
  const auto type = read_type(x.scalar_type());
  const int64_t channels = x.size(1);
  Tensor out = at::empty(x.sizes(), x.options().dtype(type), kChannelsLast);
  SPECTRALX_DISPATCH(type, [&] {
    const Tensor map = channels_last<S, A>(x.to(type));
    const Channels<A> by(moments, weight, bias, eps);
    for_parts(pixels_of(x), [&](int64_t, int64_t first, int64_t count) {
      line_kernels<S, A>().normalize(map.const_data_ptr<S>() + first * channels, count, channels,
                                     by.mean.data(), by.scale.data(), by.bias.data(), relu,
                                     data<S>(out) + first * channels);
    });
    if (format == at::MemoryFormat::Contiguous) out = relaid<S, A>(out, true);
  });
  return out.to(x.scalar_type());
}

// output_mask names the inputs in the order of the schema; the wanted gradients come in that order.
std::vector<Tensor> batch_norm_relu_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& x, const Tensor& moments,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps, bool relu,
    bool batch, at::TensorList saved, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 7,
              "output_grads, output_mask: expected 1 and 7 entries");
  check(x, moments);
  const std::optional<Tensor> given = output_grads[0];
  const auto type = read_type(x.scalar_type());
  const auto sums = sum_type(type);
  const int64_t channels = x.size(1), pixels = pixels_of(x);
  Tensor dx;
  Tensor totals = at::zeros({2, channels}, x.options().dtype(sums));  // of dz, of dz x̂
  if (!given.has_value()) {
    if (output_mask[0]) dx = at::zeros_like(x);
  } else {
    SPECTRALX_DISPATCH(type, [&] {
      const Tensor map = channels_last<S, A>(x.to(type));
      const Tensor grad = channels_last<S, A>(given->to(type));
      const S *from = map.const_data_ptr<S>(), *dy = grad.const_data_ptr<S>();
      const Channels<A> by(moments, weight, bias, eps);
      A *sum = data<A>(totals), *dot = sum + channels;
      if ((batch && output_mask[0]) || output_mask[2] || output_mask[3]) {
        const Tensor parts = at::empty({parts_of(pixels), 2, channels}, totals.options());
        for_parts(pixels, [&](int64_t part, int64_t first, int64_t count) {
          A* to = data<A>(parts) + part * 2 * channels;
          line_kernels<S, A>().norm_sums(dy + first * channels, from + first * channels, count,
                                         channels, by.mean.data(), by.scale.data(),
                                         by.bias.data(), relu, to, to + channels);
        });
        std::vector<double> joined(2 * channels);
        for (int64_t part = 0; part < parts.size(0); ++part) {
          const A* values = parts.const_data_ptr<A>() + part * 2 * channels;
          for (int64_t c = 0; c < 2 * channels; ++c) joined[c] += values[c];
        }
        for (int64_t c = 0; c < channels; ++c) {
          sum[c] = static_cast<A>(joined[c]);
          dot[c] = static_cast<A>(joined[channels + c] * by.rstd[c]);
        }
      }
      if (!output_mask[0]) return;
      // dx = scale dz - off - (x - mean) slope
      std::vector<A> off(channels), slope(channels);
      for (int64_t c = 0; batch && c < channels; ++c) {
        off[c] = by.scale[c] * sum[c] / static_cast<A>(pixels);
        slope[c] = by.scale[c] * by.rstd[c] * dot[c] / static_cast<A>(pixels);
      }
      Tensor found = at::empty(x.sizes(), map.options(), kChannelsLast);
      for_parts(pixels, [&](int64_t, int64_t first, int64_t count) {
        line_kernels<S, A>().norm_gradient(
            dy + first * channels, from + first * channels, count, channels, by.mean.data(),
            by.scale.data(), by.bias.data(), off.data(), slope.data(), relu,
            data<S>(found) + first * channels);
      });
      if (format_of(x) == at::MemoryFormat::Contiguous) found = relaid<S, A>(found, true);
      dx = laid_out(found, x);
    });
  }
  std::vector<Tensor> wanted;
  if (output_mask[0]) wanted.push_back(dx);
  if (output_mask[1]) wanted.push_back(at::zeros_like(moments));
  if (output_mask[2]) wanted.push_back(totals.select(0, 1).to(weight->scalar_type(), false, true));
  if (output_mask[3]) wanted.push_back(totals.select(0, 0).to(bias->scalar_type(), false, true));
  return wanted;
}

}  // namespace
}  // namespace spectralx::cpu

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("channel_moments", &spectralx::cpu::moments_of);
  m.impl("batch_norm_relu", &spectralx::cpu::batch_norm_relu);
  m.impl("batch_norm_relu_backward", &spectralx::cpu::batch_norm_relu_backward);
}
