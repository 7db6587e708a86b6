// spectralx::residual_halving on the CPU. What is computed when is in common/residual_halving.h; here
// are the passes between its convolutions. Tasks take a fixed number of rows and their sums are
// added up in order, so that results do not depend on the number of threads.
#include "cpu/torch.h"

#include "common/residual_halving.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/common/product.h"
#include "cpu/hypert/maps.h"
#include "cpu/upsample/lines.h"

namespace {

using at::Tensor;
using spectralx::OptionalTensor;
using spectralx::cpu::Affine;
using spectralx::cpu::line_kernels;
using spectralx::cpu::map_kernels;

constexpr int64_t kElements = 1 << 15;  // of a task: two maps of them fit in the L2 cache
// Of a strip. Maps of more than 32 MiB are not of malloc's heap but new pages each time, which cost
// as much as passes over them; smaller strips cost copies, and backward they save memory.
constexpr int64_t kStrip = 1 << 22, kBackwardStrip = 3 << 18;

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.mutable_data_ptr<T>();
}

template <typename S, typename A>
class Maps final : public spectralx::StemMaps {
 public:
  Tensor table(const Tensor& x, const Tensor& weight, const Tensor& bias,
               double eps) const override {
    const int64_t channels = x.size(1), rows = rows_of(x);
    Tensor found = at::zeros({4, channels}, wide(x));
    // Moments about the mean of some lines: differences of large means cancel nothing then. A single
    // pixel may lie several deviations aside.
    Tensor near = at::zeros({channels}, wide(x));
    if (rows > 0) {
      const Tensor lines = x.select(0, 0).narrow(1, 0, std::min<int64_t>(x.size(2), 16));
      near = lines.mean({1, 2}, false, near.scalar_type());
    }
    const std::vector<double> sums = sums_of(rows, channels, [&](int64_t row, int64_t n, A* to) {
      map_kernels<S, A>().add_moments(x.const_data_ptr<S>() + row * channels, n, channels,
                                      data<A>(near), to, to + channels);
    });
    const Tensor weights = weight.to(found.scalar_type()).contiguous();
    A* to = data<A>(found);
    for (int64_t c = 0; c < channels; ++c) {
      const double off = sums[c] / static_cast<double>(rows);
      const double variance =
          std::max(sums[channels + c] / static_cast<double>(rows) - off * off, 0.0);
      // The largest of a NaN and 0 is 0: `off` brings the NaN back.
      to[c] = static_cast<A>(data<A>(near)[c] + off);
      to[channels + c] = static_cast<A>(variance + (off - off));
      to[2 * channels + c] =
          static_cast<A>(data<A>(weights)[c] / std::sqrt(variance + (off - off) + eps));
    }
    found.select(0, 3).copy_(bias);
    return found;
  }

  void apply(const Tensor& x, const Tensor& table, const Tensor& skip,
             const Tensor& out) const override {
    const int64_t channels = x.size(1);
    const Columns columns(x, table);
    tasks(x, [&](int64_t row, int64_t n) {
      map_kernels<S, A>().apply(x.const_data_ptr<S>() + row * channels,
                                skip.defined() ? skip.const_data_ptr<S>() + row * channels : nullptr,
                                n, channels, columns.affine, data<S>(out) + row * channels);
    });
  }

  Tensor norm_gradients(const Tensor& grad, const Tensor& x, const Tensor& table, bool gelu,
                        double eps) const override {
    const int64_t channels = x.size(1);
    const Columns columns(x, table);
    const std::vector<double> sums =
        sums_of(rows_of(x), channels, [&](int64_t row, int64_t n, A* to) {
          map_kernels<S, A>().add_gradients(
              grad.const_data_ptr<S>() + row * channels, x.const_data_ptr<S>() + row * channels, n,
              channels, columns.affine, gelu, to, to + channels);
        });
    Tensor found = at::empty({2, channels}, wide(x));
    const A* variance = table.const_data_ptr<A>() + channels;
    for (int64_t c = 0; c < channels; ++c) {
      data<A>(found)[c] = static_cast<A>(sums[c]);
      data<A>(found)[channels + c] =
          static_cast<A>(sums[channels + c] / std::sqrt(variance[c] + eps));
    }
    return found;
  }

  void gradient(const Tensor& grad, const Tensor& x, const Tensor& table,
                const Tensor& norm_gradients, int64_t pixels, bool gelu, double eps,
                const Tensor& out) const override {
    const int64_t channels = x.size(1);
    const Columns columns(x, table);
    std::vector<A> slope(channels, A(0)), offset(channels, A(0));
    if (table.defined()) {
      const A *to = norm_gradients.const_data_ptr<A>(), *variance = columns.affine.mean + channels;
      for (int64_t c = 0; c < channels; ++c) {
        const double share = -columns.affine.scale[c] / static_cast<double>(pixels);
        slope[c] = static_cast<A>(share * to[channels + c] / std::sqrt(variance[c] + eps));
        offset[c] = static_cast<A>(share * to[c]);
      }
    }
    tasks(x, [&](int64_t row, int64_t n) {
      map_kernels<S, A>().gradient(grad.const_data_ptr<S>() + row * channels,
                                   x.const_data_ptr<S>() + row * channels, n, channels,
                                   columns.affine, slope.data(), offset.data(), gelu,
                                   data<S>(out) + row * channels);
    });
  }

  // The product by tiles that stay in the cache: the lifted map is never written.
  Tensor lifted_sum(const Tensor& x, const Tensor& table, const Tensor& images, const Tensor& lift,
                    bool own) const override {
    constexpr int64_t kPixels = 128;
    const int64_t channels = x.size(1), bands = images.size(1);
    const Columns columns(x, table);
    const Tensor matrix = lift.t().to(wide(x).dtype()).contiguous();  // [bands, channels]
    Tensor sum = own ? x : at::empty_like(x, spectralx::kLast);
    tasks(x, [&](int64_t row, int64_t n) {
      std::vector<A> made(kPixels * channels), given(std::is_same_v<S, A> ? 0 : kPixels * bands);
      std::vector<S> skip(std::is_same_v<S, A> ? 0 : kPixels * channels);
      for (const int64_t end = row + n; row < end; row += kPixels) {
        const int64_t count = std::min(kPixels, end - row);
        const S* from = images.const_data_ptr<S>() + row * bands;
        const auto multiply = [&](const A* left) {
          spectralx::cpu::product(count, channels, bands, left, bands, matrix.const_data_ptr<A>(),
                                  channels, made.data(), channels, false);
        };
        const S* add;
        if constexpr (std::is_same_v<S, A>) {
          multiply(from);
          add = made.data();
        } else {
          std::copy_n(from, count * bands, given.data());
          multiply(given.data());
          std::copy_n(made.data(), count * channels, skip.data());
          add = skip.data();
        }
        map_kernels<S, A>().apply(x.const_data_ptr<S>() + row * channels, add, count, channels,
                                  columns.affine, data<S>(sum) + row * channels);
      }
      spectralx::cpu::end_products();
    });
    return sum;
  }

  int64_t strip() const override { return kStrip; }
  int64_t backward_strip() const override { return kBackwardStrip; }

  Tensor with_ones(const Tensor& images, int64_t /*channels*/) const override {
    const int64_t bands = images.size(1), plane = images.size(2) * images.size(3);
    // Rows cut out of planes are taken as they are.
    const bool dense = images.stride(3) == 1 && images.stride(2) == images.size(3);
    const Tensor planes = dense ? images : images.contiguous();
    Tensor to = at::empty({images.size(0), bands + 1, images.size(2), images.size(3)},
                          images.options(), spectralx::kLast);
    constexpr int64_t kPixels = 256;
    const int64_t parts = (plane + kPixels - 1) / kPixels;
    at::parallel_for(0, images.size(0) * parts, 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / parts, pixel = task % parts * kPixels;
        const int64_t n = std::min(kPixels, plane - pixel);
        S* at = data<S>(to) + (image * plane + pixel) * (bands + 1);
        line_kernels<S, A>().transpose(
            planes.const_data_ptr<S>() + image * planes.stride(0) + pixel, bands, n,
            planes.stride(1), bands + 1, at);
        for (int64_t i = 0; i < n; ++i) at[i * (bands + 1) + bands] = static_cast<S>(1.0f);
      }
    });
    return to;
  }

 private:
  // The columns of a table, or of z = x.
  struct Columns {
    std::vector<A> identity;
    Affine<A> affine;

    Columns(const Tensor& x, const Tensor& table) {
      const int64_t channels = x.size(1);
      if (!table.defined()) {
        identity.assign(2 * channels, A(0));
        identity.resize(3 * channels, A(1));
        affine = {identity.data(), identity.data() + 2 * channels, identity.data()};
        return;
      }
      const A* of = table.const_data_ptr<A>();
      affine = {of, of + 2 * channels, of + 3 * channels};
    }
  };

  static at::TensorOptions wide(const Tensor& x) {
    return x.options().dtype(c10::CppTypeToScalarType<A>::value).memory_format(std::nullopt);
  }

  static int64_t rows_of(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

  // Calls run(first row, rows) for all rows of x.
  template <typename Run>
  static void tasks(const Tensor& x, Run run) {
    const int64_t rows = rows_of(x), most = rows_of_task(x.size(1));
    at::parallel_for(0, (rows + most - 1) / most, 1, [&](int64_t begin, int64_t end) {
      run(begin * most, std::min(end * most, rows) - begin * most);
    });
  }

  static int64_t rows_of_task(int64_t channels) {
    return std::max<int64_t>(kElements / std::max<int64_t>(channels, 1), 1);
  }

  // [2, C]: what add(first row, rows, sums) adds, summed over all rows.
  template <typename Add>
  static std::vector<double> sums_of(int64_t rows, int64_t channels, Add add) {
    const int64_t most = rows_of_task(channels), count = (rows + most - 1) / most;
    std::vector<A> parts(count * 2 * channels, A(0));
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        add(task * most, std::min(most, rows - task * most), parts.data() + task * 2 * channels);
      }
    });
    std::vector<double> sums(2 * channels, 0.0);
    for (int64_t task = 0; task < count; ++task) {
      for (int64_t i = 0; i < 2 * channels; ++i) sums[i] += parts[task * 2 * channels + i];
    }
    return sums;
  }
};

const spectralx::StemMaps& maps_for(at::ScalarType type) {
  static const Maps<float, float> floats;
  static const Maps<double, double> doubles;
  static const Maps<c10::BFloat16, float> bfloats;
  if (type == at::kDouble) return doubles;
  if (type == at::kBFloat16) return bfloats;
  TORCH_CHECK_TYPE(type == at::kFloat, "x: got dtype ", type,
                   ", expected float32, float64 or bfloat16");
  return floats;
}

// float16 is computed in float32: the library behind ATen convolves it on few processors.
at::ScalarType computed(const Tensor& x) {
  return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
}

OptionalTensor converted(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor.has_value() ? OptionalTensor(tensor->to(type)) : std::nullopt;
}

struct Given {
  at::ScalarType type;
  Tensor x, weight, bias, half, half_bias;
  OptionalTensor lift, lift_bias, norm, norm_bias, half_norm, half_norm_bias;

  spectralx::StemWeights weights() const {
    return {lift, lift_bias, weight, bias, norm, norm_bias, half, half_bias, half_norm, half_norm_bias};
  }
};

Given given(const Tensor& x, const OptionalTensor& lift, const OptionalTensor& lift_bias,
            const Tensor& weight, const Tensor& bias, const OptionalTensor& norm,
            const OptionalTensor& norm_bias, const Tensor& half, const Tensor& half_bias,
            const OptionalTensor& half_norm, const OptionalTensor& half_norm_bias) {
  const auto type = computed(x);
  return {type, x.to(type), weight.to(type), bias.to(type), half.to(type), half_bias.to(type),
          converted(lift, type), converted(lift_bias, type), converted(norm, type),
          converted(norm_bias, type), converted(half_norm, type), converted(half_norm_bias, type)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_halving(
    const Tensor& x, const OptionalTensor& lift, const OptionalTensor& lift_bias,
    const Tensor& weight, const Tensor& bias, const OptionalTensor& norm,
    const OptionalTensor& norm_bias, const Tensor& half, const Tensor& half_bias,
    const OptionalTensor& half_norm, const OptionalTensor& half_norm_bias, double eps, bool keep) {
  const Given g = given(x, lift, lift_bias, weight, bias, norm, norm_bias, half, half_bias, half_norm,
                        half_norm_bias);
  const spectralx::StemWeights weights = g.weights();
  auto [out, table, half_table, convolved, halved] =
      spectralx::ResidualHalving(maps_for(g.type), g.x, weights, eps).forward(keep);
  const auto type = x.scalar_type();
  return {out.to(type), table, half_table, convolved.to(type), halved.to(type)};
}

std::vector<Tensor> residual_halving_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& x, const OptionalTensor& lift,
    const OptionalTensor& lift_bias, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& norm, const OptionalTensor& norm_bias, const Tensor& half,
    const Tensor& half_bias, const OptionalTensor& half_norm, const OptionalTensor& half_norm_bias,
    double eps, bool /*keep*/, at::TensorList saved, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && saved.size() == 4,
              "output_grads, saved: expected 1 and 4 entries");
  const std::array<OptionalTensor, 11> inputs{x,         lift, lift_bias, weight,    bias, norm,
                                              norm_bias, half, half_bias, half_norm, half_norm_bias};
  const Given g = given(x, lift, lift_bias, weight, bias, norm, norm_bias, half, half_bias, half_norm,
                        half_norm_bias);
  const std::vector<Tensor> kept{saved[0], saved[1], saved[2].to(g.type), saved[3].to(g.type)};
  return spectralx::residual_halving_gradients(maps_for(g.type), g.x, g.weights(), eps,
                                               converted(output_grads[0], g.type), kept, inputs,
                                               output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("residual_halving", residual_halving);
  m.impl("residual_halving_backward", residual_halving_backward);
}
