// spectralx::channel_moments and batch_norm_relu on CUDA: memory and layouts around common/norm.cu.
#include <torch/library.h>

#include <cstdint>
#include <vector>

#include "cuda/common/glue.h"
#include "cuda/common/moments.h"

namespace {

using namespace spectralx::cuda;

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

// The pass without what it writes, and the tensors that it reads.
struct Pass {
  SpectralxNorm raw{};
  Tensor x, grad, moments, weight, bias;

  Pass(const Tensor& map, const OptionalTensor& map_grad, const Tensor& given,
       const OptionalTensor& scale, const OptionalTensor& offset, double eps, bool relu)
      : x(map.contiguous(kChannelsLast)),
        grad(map_grad.has_value() ? map_grad->contiguous(kChannelsLast) : Tensor()),
        moments(given.to(wide_type(map)).contiguous()),
        weight(prepared(scale, wide_type(map))),
        bias(prepared(offset, wide_type(map))) {
    TORCH_CHECK_VALUE(map.dim() == 4 && given.sizes() == at::IntArrayRef({2, map.size(1)}),
                      "moments: got shape ", given.sizes(), ", expected [2, channels] of x, ",
                      map.sizes());
    raw.type = type_code(map), raw.rows = pixels_of(map), raw.channels = map.size(1);
    raw.activation = relu ? 1 : 0, raw.eps = eps;
    raw.x = pointer(x), raw.grad = pointer(grad), raw.moments = pointer(moments);
    raw.weight = pointer(weight), raw.bias = pointer(bias);
  }
};

Tensor channel_moments(const Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  return moments_of("channel_moments", x);
}

Tensor batch_norm_relu(const Tensor& x, const Tensor& moments, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps, bool relu, bool batch) {
  const c10::cuda::CUDAGuard guard(x.device());
  Pass pass(x, std::nullopt, moments, weight, bias, eps, relu);
  const Tensor out = at::empty_like(pass.x);
  pass.raw.out = pointer(out);
  check_launch("batch_norm_relu", spectralx_normalize(&pass.raw, current_stream()));
  const bool last = x.is_contiguous(kChannelsLast) && !x.is_contiguous();
  return out.contiguous(last ? kChannelsLast : at::MemoryFormat::Contiguous);
}

// output_mask names the inputs in the order of the schema; the wanted gradients come in that order.
std::vector<Tensor> batch_norm_relu_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& x, const Tensor& moments,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool relu, bool batch,
    at::TensorList saved, const c10::List<bool>& output_mask) {
  const char* name = "batch_norm_relu_backward";
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 7,
              "output_grads, output_mask: expected 1 and 7 entries");
  const c10::cuda::CUDAGuard guard(x.device());
  const OptionalTensor given = output_grads[0];
  const bool some = given.has_value() && given->defined();
  Tensor dx, totals;
  if (some) {
    Pass pass(x, given, moments, weight, bias, eps, relu);
    const int64_t channels = pass.raw.channels;
    if ((batch && output_mask[0]) || output_mask[2] || output_mask[3]) {
      const Tensor parts =
          at::empty({spectralx_moment_parts(pass.raw.rows), 2, channels}, pass.moments.options());
      totals = at::empty({2, channels}, pass.moments.options());
      check_launch(name, spectralx_norm_sums(&pass.raw, pointer(parts), pointer(totals),
                                             current_stream()));
    }
    if (output_mask[0]) {
      const Tensor found = at::empty_like(pass.x);
      pass.raw.totals = batch ? pointer(totals) : nullptr;
      pass.raw.out = pointer(found);
      check_launch(name, spectralx_norm_gradient(&pass.raw, current_stream()));
      dx = at::empty_like(x);
      if (dx.strides() == found.strides()) {
        dx = found;
      } else {
        dx.copy_(found);
      }
    }
  } else {
    if (output_mask[0]) dx = at::zeros_like(x);
    totals = at::zeros({2, x.size(1)}, x.options().dtype(wide_type(x)));
  }
  std::vector<Tensor> wanted;
  if (output_mask[0]) wanted.push_back(dx);
  if (output_mask[1]) wanted.push_back(at::zeros_like(moments));
  if (output_mask[2]) wanted.push_back(totals.select(0, 1).to(weight->scalar_type(), false, true));
  if (output_mask[3]) wanted.push_back(totals.select(0, 0).to(bias->scalar_type(), false, true));
  return wanted;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("channel_moments", &channel_moments);
  m.impl("batch_norm_relu", &batch_norm_relu);
  m.impl("batch_norm_relu_backward", &batch_norm_relu_backward);
}
