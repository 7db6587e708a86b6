// spectralx::upsample_conv2d on CUDA: the vendor's products on the small map, what lies between them
// in convolution.cuh. Where the upsampled map is formed ("map"), the vendor's convolution.
#include <ATen/ops/convolution_backward.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cuda/common/glue.h"
#include "cuda/upsample/kernels.h"
#include "cuda/common/moments.h"

namespace {

using namespace spectralx::cuda;

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

struct Size {
  int64_t rows, columns;
};

// The pass without its tensors, and the scratch that its launches share.
struct Pass {
  SpectralxConvolution raw{};
  Tensor places;

  Pass(const Tensor& map, int64_t channels, Size up, Size kernel, Size padding,
       bool align_corners) {
    raw.type = type_code(map);
    raw.batch = map.size(0), raw.channels = channels;
    raw.height = map.size(2), raw.width = map.size(3);
    raw.up_height = up.rows, raw.up_width = up.columns;
    raw.kernel_rows = kernel.rows, raw.kernel_columns = kernel.columns;
    raw.row_padding = padding.rows, raw.column_padding = padding.columns;
    raw.align_corners = align_corners;
    places = at::empty({spectralx_convolution_places(&raw)}, map.options().dtype(at::kByte));
    raw.places = pointer(places);
  }

  int64_t rows() const { return raw.up_height + 2 * raw.row_padding - raw.kernel_rows + 1; }
  int64_t columns() const { return raw.up_width + 2 * raw.column_padding - raw.kernel_columns + 1; }

  // The gradient of Z [B * h * w, ky * kx * O] of grad [B, O, H', W'].
  Tensor gather(const char* name, const Tensor& grad) {
    const Tensor last = grad.contiguous(kChannelsLast);
    const Tensor dz = at::empty({raw.batch * raw.height * raw.width,
                                 raw.kernel_rows * raw.kernel_columns * raw.channels},
                                grad.options());
    raw.grad = pointer(last), raw.dz = pointer(dz);
    check_launch(name, spectralx_tap_gather(&raw, current_stream()));
    return dz;
  }
};

Pass pass_of(const Tensor& x, const Tensor& weight, at::IntArrayRef size, at::IntArrayRef padding,
             bool align_corners) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
                    "x: got shape ", x.sizes(),
                    ", expected [batch, channels, height, width] of at least 1");
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == x.size(1) &&
                        weight.size(2) > 0 && weight.size(3) > 0,
                    "weight: got shape ", weight.sizes(), ", expected [out, ", x.size(1),
                    ", rows, columns] of at least 1");
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, "size: got ", size,
                    ", expected two integers of at least 1");
  TORCH_CHECK_VALUE(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, "padding: got ",
                    padding, ", expected two integers of at least 0");
  Pass pass(x, weight.size(0), {size[0], size[1]}, {weight.size(2), weight.size(3)},
            {padding[0], padding[1]}, align_corners);
  TORCH_CHECK_VALUE(pass.rows() > 0 && pass.columns() > 0, "size: got ", size,
                    ", expected at least the kernel less twice the padding");
  return pass;
}

// [pixels, channels] of a map, channels side by side: of the transpose, the rows of few pixels begin
// where the vendor's product reads two bytes at a time.
Tensor as_rows(const Tensor& map) {
  return map.permute({0, 2, 3, 1}).reshape({-1, map.size(1)}).contiguous();
}

// [ky * kx * O, C], as Z has its columns.
Tensor filters_of(const Tensor& weight) {
  return weight.permute({2, 3, 0, 1}).reshape({-1, weight.size(1)});
}

Tensor resized(const Tensor& x, at::IntArrayRef size, bool align_corners) {
  if (x.sizes().slice(2) == size) return x;
  return at::upsample_bilinear2d(x, size, align_corners);
}

// The output and, where asked, its moments [2, O].
std::tuple<Tensor, Tensor> convolved(const char* name, const Tensor& x, const Tensor& weight,
                                     const OptionalTensor& bias, const OptionalTensor& addend,
                                     at::IntArrayRef size, at::IntArrayRef padding,
                                     bool align_corners, bool by_taps, bool relu,
                                     bool with_moments) {
  const c10::cuda::CUDAGuard guard(x.device());
  Pass pass = pass_of(x, weight, size, padding, align_corners);
  auto& raw = pass.raw;
  const at::DimVector shape = {raw.batch, raw.channels, pass.rows(), pass.columns()};
  TORCH_CHECK_VALUE(!bias.has_value() || bias->sizes() == at::IntArrayRef({raw.channels}),
                    "bias: got shape ", bias->sizes(), ", expected [", raw.channels, "]");
  TORCH_CHECK_VALUE(!addend.has_value() || addend->sizes() == at::IntArrayRef(shape),
                    "addend: got shape ", addend->sizes(), ", expected ", at::IntArrayRef(shape));
  // Channels last where x is that and nothing else.
  const auto format = x.is_contiguous(kChannelsLast) && !x.is_contiguous()
                          ? kChannelsLast
                          : at::MemoryFormat::Contiguous;
  if (!by_taps) {
    Tensor out = at::conv2d(resized(x, size, align_corners), weight, bias, 1, padding);
    if (addend.has_value()) out.add_(*addend);
    if (relu) out.relu_();
    out = out.contiguous(format);
    return {out, with_moments ? moments_of(name, out) : Tensor()};
  }
  const Tensor z = at::mm(as_rows(x), filters_of(weight).t());
  const Tensor wide = prepared(bias, wide_type(x)), more = addend.value_or(Tensor());
  Tensor out = at::empty(shape, x.options(), format);
  raw.relu = relu;
  raw.z = pointer(z), raw.bias = pointer(wide);
  raw.addend = pointer(more), raw.out = pointer(out);
  if (more.defined()) {
    raw.addend_image = more.stride(0), raw.addend_channel = more.stride(1);
    raw.addend_row = more.stride(2), raw.addend_column = more.stride(3);
  }
  raw.out_image = out.stride(0), raw.out_channel = out.stride(1);
  raw.out_row = out.stride(2), raw.out_column = out.stride(3);
  const Parts parts(x, with_moments ? spectralx_tap_sum_parts(&raw) : 0, raw.channels);
  if (with_moments) raw.parts = pointer(parts.values), raw.counts = pointer(parts.counts);
  check_launch(name, spectralx_tap_sum(&raw, current_stream()));
  return {out, with_moments ? parts.joined(name, raw.type) : Tensor()};
}

Tensor upsample_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& addend, at::IntArrayRef size, at::IntArrayRef padding,
                       bool align_corners, bool by_taps, bool relu) {
  return std::get<0>(convolved("upsample_conv2d", x, weight, bias, addend, size, padding,
                               align_corners, by_taps, relu, false));
}

std::tuple<Tensor, Tensor> upsample_conv2d_moments(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& addend,
    at::IntArrayRef size, at::IntArrayRef padding, bool align_corners, bool by_taps) {
  return convolved("upsample_conv2d_moments", x, weight, bias, addend, size, padding, align_corners,
                   by_taps, false, true);
}

// What "map" passes back: the vendor's gradients of the convolution; that of the upsampling by the
// gather of one tap, in a fixed order, where torch adds with atomics.
void map_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, at::IntArrayRef size,
                  at::IntArrayRef padding, bool align_corners,
                  const std::array<Tensor, 4>& found) {
  auto [dlarge, dweight, dbias] = at::convolution_backward(
      grad, resized(x, size, align_corners), weight,
      at::OptionalIntArrayRef(weight.sizes().slice(0, 1)), {1, 1}, padding, {1, 1}, false, {0, 0}, 1,
      {found[0].defined(), found[1].defined(), found[2].defined()});
  if (found[1].defined()) found[1].copy_(dweight);
  if (found[2].defined()) found[2].copy_(dbias);
  if (!found[0].defined()) return;
  if (x.sizes().slice(2) == size) {
    found[0].copy_(dlarge);
    return;
  }
  Pass one(x, x.size(1), {size[0], size[1]}, {1, 1}, {0, 0}, align_corners);
  const Tensor dx = one.gather("upsample_conv2d_backward", dlarge);
  found[0].permute({0, 2, 3, 1}).copy_(dx.view({x.size(0), x.size(2), x.size(3), x.size(1)}));
}

void taps_backward(Pass& pass, const Tensor& grad, const Tensor& x, const Tensor& weight,
                   const std::array<Tensor, 4>& found) {
  const char* name = "upsample_conv2d_backward";
  if (found[2].defined()) {
    const int64_t pixels = grad.size(0) * grad.size(2) * grad.size(3);
    const auto wide = grad.options().dtype(wide_type(grad));
    const Tensor parts = at::empty({spectralx_channel_parts(pixels), pass.raw.channels}, wide);
    const Tensor total = at::empty({pass.raw.channels}, wide);
    check_launch(name, spectralx_channel_sums(pass.raw.type, pointer(grad), pixels,
                                              pass.raw.channels, pointer(parts), pointer(total),
                                              current_stream()));
    found[2].copy_(total);
  }
  if (!found[0].defined() && !found[1].defined()) return;
  const Tensor dz = pass.gather(name, grad);
  if (found[0].defined()) {
    const Tensor pixels = found[0].permute({0, 2, 3, 1});
    const Tensor filters = filters_of(weight);
    if (pixels.is_contiguous()) {
      Tensor rows = pixels.view({-1, x.size(1)});
      at::mm_out(rows, dz, filters);
    } else {
      pixels.copy_(at::mm(dz, filters).view(pixels.sizes()));
    }
  }
  if (found[1].defined()) {
    const Tensor filters_grad = at::mm(dz.t(), as_rows(x));
    found[1].copy_(filters_grad
                       .view({weight.size(2), weight.size(3), weight.size(0), weight.size(1)})
                       .permute({2, 3, 0, 1}));
  }
}

// output_mask names the inputs in the order of the schema; the wanted gradients come in that order.
std::vector<Tensor> upsample_conv2d_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& addend, at::IntArrayRef size,
    at::IntArrayRef padding, bool align_corners, bool by_taps, bool relu, at::TensorList saved,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 9,
              "output_grads, output_mask: expected 1 and 9 entries");
  TORCH_CHECK(saved.size() == (relu ? 1 : 0), "saved: got ", saved.size(), " tensors, expected ",
              relu ? 1 : 0);
  const c10::cuda::CUDAGuard guard(x.device());
  Pass pass = pass_of(x, weight, size, padding, align_corners);
  const std::array<Tensor, 4> inputs = {x, weight, bias.value_or(Tensor()),
                                        addend.value_or(Tensor())};
  std::array<Tensor, 4> found;
  std::vector<Tensor> wanted;
  for (size_t i = 0; i < 4; ++i) {
    if (!output_mask[i]) continue;
    found[i] = at::empty_like(inputs[i]);
    wanted.push_back(found[i]);
  }
  const OptionalTensor given = output_grads[0];
  if (!given.has_value() || !given->defined()) {
    for (Tensor& grad : wanted) grad.zero_();
    return wanted;
  }
  TORCH_CHECK_VALUE(given->sizes() == at::IntArrayRef({pass.raw.batch, pass.raw.channels,
                                                       pass.rows(), pass.columns()}),
                    "output_grads: got shape ", given->sizes(), ", expected that of the output");
  Tensor grad = relu ? at::threshold_backward(*given, saved[0], 0) : *given;
  if (found[3].defined()) found[3].copy_(grad);
  if (!found[0].defined() && !found[1].defined() && !found[2].defined()) return wanted;
  if (by_taps) {
    grad = grad.contiguous(kChannelsLast);
    taps_backward(pass, grad, x, weight, found);
  } else {
    map_backward(grad, x, weight, size, padding, align_corners, found);
  }
  return wanted;
}

std::vector<Tensor> upsample_conv2d_moments_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& addend, at::IntArrayRef size,
    at::IntArrayRef padding, bool align_corners, bool by_taps, at::TensorList saved,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 2 && output_mask.size() == 8,
              "output_grads, output_mask: expected 2 and 8 entries");
  c10::List<OptionalTensor> grads;
  grads.push_back(output_grads[0]);
  c10::List<bool> mask = output_mask.copy();
  mask.push_back(false);
  return upsample_conv2d_backward(grads, x, weight, bias, addend, size, padding, align_corners,
                                  by_taps, false, saved, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("upsample_conv2d", &upsample_conv2d);
  m.impl("upsample_conv2d_backward", &upsample_conv2d_backward);
  m.impl("upsample_conv2d_moments", &upsample_conv2d_moments);
  m.impl("upsample_conv2d_moments_backward", &upsample_conv2d_moments_backward);
}
