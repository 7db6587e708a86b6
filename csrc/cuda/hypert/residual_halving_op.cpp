// spectralx::residual_halving on CUDA. What is computed when is in common/residual_halving.h; here are
// the passes between its convolutions, memory around common/norm.cu and maps.cu.
#include "common/residual_halving.h"

#include <torch/library.h>

#include <array>
#include <limits>
#include <tuple>
#include <vector>

#include "cuda/common/moments.h"
#include "cuda/hypert/kernels.h"

namespace {

using namespace spectralx::cuda;

constexpr const char* kName = "residual_halving";

class Maps final : public spectralx::StemMaps {
 public:
  Tensor table(const Tensor& x, const Tensor& weight, const Tensor& bias,
               double eps) const override {
    const int64_t channels = x.size(1), rows = pixels_of(x);
    const Tensor found = at::empty({4, channels}, x.options().dtype(wide_type(x)));
    if (rows == 0) return found.fill_(std::numeric_limits<double>::quiet_NaN());
    const Tensor by = weight.contiguous(), offset = bias.contiguous();
    moments_into(kName, x, found);
    check_launch(kName, spectralx_norm_table(type_code(x), pointer(by), pointer(offset), channels,
                                             eps, pointer(found), current_stream()));
    return found;
  }

  void apply(const Tensor& x, const Tensor& table, const Tensor& skip,
             const Tensor& out) const override {
    SpectralxNorm pass = pass_of(x, table, skip.defined(), 0);
    pass.skip = pointer(skip), pass.out = pointer(out);
    check_launch(kName, spectralx_normalize(&pass, current_stream()));
  }

  Tensor norm_gradients(const Tensor& grad, const Tensor& x, const Tensor& table, bool gelu,
                        double eps) const override {
    SpectralxNorm pass = pass_of(x, table, gelu, eps);
    pass.grad = pointer(grad);
    const Tensor parts =
        at::empty({spectralx_moment_parts(pass.rows), 2, pass.channels}, table.options());
    const Tensor sums = at::empty({2, pass.channels}, table.options());
    check_launch(kName,
                 spectralx_norm_sums(&pass, pointer(parts), pointer(sums), current_stream()));
    return sums;
  }

  void gradient(const Tensor& grad, const Tensor& x, const Tensor& table,
                const Tensor& norm_gradients, int64_t /*pixels*/, bool gelu, double eps,
                const Tensor& out) const override {
    SpectralxNorm pass = pass_of(x, table, gelu, eps);
    pass.grad = pointer(grad), pass.totals = pointer(norm_gradients), pass.out = pointer(out);
    check_launch(kName, spectralx_norm_gradient(&pass, current_stream()));
  }

  Tensor with_ones(const Tensor& images, int64_t channels) const override {
    const Tensor planes = images.contiguous();
    const Tensor to = at::empty({images.size(0), channels, images.size(2), images.size(3)},
                                images.options(), spectralx::kLast);
    check_launch(kName, spectralx_with_ones(type_code(planes), pointer(planes), planes.size(0),
                                            planes.size(2) * planes.size(3), planes.size(1),
                                            channels, pointer(to), current_stream()));
    return to;
  }

  // The vendor's convolutions of channels-last maps take 16 bytes of channels at once.
  int64_t padded(int64_t channels) const override { return (channels + 7) / 8 * 8; }

 private:
  static SpectralxNorm pass_of(const Tensor& x, const Tensor& table, bool gelu, double eps) {
    SpectralxNorm pass{};
    pass.type = type_code(x), pass.rows = pixels_of(x), pass.channels = x.size(1);
    pass.activation = gelu ? 2 : 0, pass.eps = eps;
    pass.x = pointer(x);
    if (!table.defined()) return pass;
    pass.moments = pointer(table);
    pass.scale = pointer(table.select(0, 2)), pass.bias = pointer(table.select(0, 3));
    return pass;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_halving(
    const Tensor& x, const OptionalTensor& lift, const OptionalTensor& lift_bias,
    const Tensor& weight, const Tensor& bias, const OptionalTensor& norm,
    const OptionalTensor& norm_bias, const Tensor& half, const Tensor& half_bias,
    const OptionalTensor& half_norm, const OptionalTensor& half_norm_bias, double eps, bool keep) {
  const c10::cuda::CUDAGuard guard(x.device());
  const spectralx::StemWeights weights{lift, lift_bias, weight,    bias,      norm,
                                       norm_bias, half, half_bias, half_norm, half_norm_bias};
  return spectralx::ResidualHalving(Maps(), x, weights, eps).forward(keep);
}

std::vector<Tensor> residual_halving_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& x, const OptionalTensor& lift,
    const OptionalTensor& lift_bias, const Tensor& weight, const Tensor& bias,
    const OptionalTensor& norm, const OptionalTensor& norm_bias, const Tensor& half,
    const Tensor& half_bias, const OptionalTensor& half_norm, const OptionalTensor& half_norm_bias,
    double eps, bool /*keep*/, at::TensorList saved, const c10::List<bool>& output_mask) {
  const c10::cuda::CUDAGuard guard(x.device());
  const spectralx::StemWeights weights{lift, lift_bias, weight,    bias,      norm,
                                       norm_bias, half, half_bias, half_norm, half_norm_bias};
  const std::array<OptionalTensor, 11> inputs{x,         lift, lift_bias, weight,    bias, norm,
                                              norm_bias, half, half_bias, half_norm, half_norm_bias};
  TORCH_CHECK(output_grads.size() == 1, "output_grads: expected 1 entry");
  return spectralx::residual_halving_gradients(Maps(), x, weights, eps, output_grads[0], saved,
                                               inputs, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("residual_halving", residual_halving);
  m.impl("residual_halving_backward", residual_halving_backward);
}
