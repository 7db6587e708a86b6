// spectralx::upsample_conv2d and upsample_conv2d_moments on the CPU: checks, types and layouts around
// the two algorithms. Where the upsampled map is formed ("map"), the library's convolution.
#include "cpu/torch.h"

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/upsample/norm.h"
#include "cpu/upsample/products.h"
#include "cpu/upsample/taps.h"
#include "cpu/upsample/winograd.h"

namespace {

using namespace spectralx::cpu;
using at::Tensor;

Shape shape_of(const Tensor& x, const Tensor& weight, at::IntArrayRef size,
               at::IntArrayRef padding) {
  TORCH_CHECK(x.dim() == 4, "x: got ", x.dim(), " dimensions, expected 4");
  TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1), "weight: got shape ",
              weight.sizes(), ", expected [out, ", x.size(1), ", rows, columns]");
  TORCH_CHECK(size.size() == 2 && padding.size() == 2, "size, padding: expected two integers");
  const Shape s{x.size(0),      x.size(1),      x.size(2),
                x.size(3),      weight.size(0), weight.size(2),
                weight.size(3), size[0] + 2 * padding[0] - weight.size(2) + 1,
                size[1] + 2 * padding[1] - weight.size(3) + 1};
  TORCH_CHECK(s.rows > 0 && s.columns > 0, "size: got ", size,
              ", expected at least the kernel less twice the padding");
  return s;
}

// [pixels, channels] of a channels-last map.
Tensor as_rows(const Tensor& map) {
  return map.permute({0, 2, 3, 1}).reshape({-1, map.size(1)});
}

Tensor resized(const Tensor& x, at::IntArrayRef size, bool align_corners) {
  if (x.sizes().slice(2) == size) return x;
  return at::upsample_bilinear2d(x, size, align_corners);
}

// The output and, where asked, its moments [2, O].
std::tuple<Tensor, Tensor> convolved(const Tensor& x, const Tensor& weight,
                                     const std::optional<Tensor>& bias,
                                     const std::optional<Tensor>& addend, const Placement& placement,
                                     bool by_taps, bool relu, bool with_moments) {
  const Shape s = shape_of(x, weight, placement.size, placement.padding);
  if (addend.has_value()) {
    TORCH_CHECK(addend->sizes() == at::IntArrayRef({s.batch, s.outs, s.rows, s.columns}),
                "addend: got shape ", addend->sizes(), ", expected that of the output");
  }
  const auto format = format_of(x);
  const auto type = by_taps ? product_type(x.scalar_type()) : x.scalar_type();
  if (!by_taps) {
    const Tensor large = resized(x, placement.size, placement.align_corners);
    Tensor out;
    if (winograd_takes(large, weight, placement.padding)) {
      out = winograd_forward(large, weight);
      if (bias.has_value()) out.add_(bias->view({1, -1, 1, 1}));
    } else {
      out = at::conv2d(large, weight, bias, 1, placement.padding);
    }
    if (addend.has_value()) out.add_(*addend);
    if (relu) out.relu_();
    out = out.contiguous(format);
    return {out, with_moments ? moments_of(out) : Tensor()};
  }
  const auto sums = sum_type(type);
  Tensor out = at::empty({s.batch, s.outs, s.rows, s.columns}, x.options().dtype(type),
                         kChannelsLast);
  // Of what is stored; narrower types than the products' are rounded again, and so read again.
  const bool gathered = with_moments && type == x.scalar_type();
  const Epilogue epilogue{
      bias.has_value() ? bias->to(sums).contiguous() : Tensor(),
      addend.has_value() ? addend->to(type).contiguous(kChannelsLast) : Tensor(), relu,
      gathered ? at::empty({s.batch * s.rows, 2, s.outs}, out.options().dtype(sums)) : Tensor()};
  taps_forward(s, placement, as_rows(x.to(type)), weight.to(type), epilogue, out);
  Tensor moments;
  if (gathered) moments = merged_moments(epilogue.moments, s.columns, s.batch * s.rows * s.columns);
  if (format == at::MemoryFormat::Contiguous) {
    SPECTRALX_DISPATCH(type, [&] { out = relaid<S, A>(out, true); });
  }
  out = out.to(x.scalar_type());
  if (with_moments && !gathered) moments = moments_of(out);
  return {out, moments};
}

Tensor upsample_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& addend, at::IntArrayRef size,
                       at::IntArrayRef padding, bool align_corners, bool by_taps, bool relu) {
  return std::get<0>(convolved(x, weight, bias, addend, {size, padding, align_corners}, by_taps,
                               relu, false));
}

std::tuple<Tensor, Tensor> upsample_conv2d_moments(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& addend, at::IntArrayRef size, at::IntArrayRef padding,
    bool align_corners, bool by_taps) {
  return convolved(x, weight, bias, addend, {size, padding, align_corners}, by_taps, false, true);
}

// output_mask names the inputs in the order of the schema; the wanted gradients come in that order.
std::vector<Tensor> upsample_conv2d_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, at::IntArrayRef size,
    at::IntArrayRef padding, bool align_corners, bool by_taps, bool relu, at::TensorList saved,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1, "output_grads: got ", output_grads.size(), ", expected 1");
  TORCH_CHECK(output_mask.size() == 9, "output_mask: got ", output_mask.size(), ", expected 9");
  TORCH_CHECK(saved.size() == (relu ? 1 : 0), "saved: got ", saved.size(), " tensors, expected ",
              relu ? 1 : 0);
  const Shape s = shape_of(x, weight, size, padding);
  const std::optional<Tensor> given = output_grads[0];
  const std::array<Tensor, 4> inputs = {x, weight, bias.value_or(Tensor()),
                                        addend.value_or(Tensor())};
  std::array<Tensor, 4> found;
  for (size_t i = 0; i < 4; ++i) {
    // Of the ordinary path's, what the library returns is taken over.
    if (output_mask[i] && (by_taps || i == 3 || !given.has_value())) {
      found[i] = at::empty_like(inputs[i]);
    }
  }
  const auto wanted = [&] {
    std::vector<Tensor> list;
    for (const Tensor& grad : found) {
      if (grad.defined()) list.push_back(grad);
    }
    return list;
  };
  if (!given.has_value()) {
    for (Tensor& grad : found) {
      if (grad.defined()) grad.zero_();
    }
    return wanted();
  }
  Tensor grad = relu ? at::threshold_backward(*given, saved[0], 0) : *given;
  if (found[3].defined()) found[3].copy_(grad);

  const auto type = by_taps ? product_type(x.scalar_type()) : x.scalar_type();
  if (!by_taps) {
    const Tensor large = resized(x, size, align_corners);
    Tensor dlarge, dweight, dbias;
    if (winograd_takes(large, weight, padding)) {
      grad = channels_last<float, float>(grad);
      if (output_mask[0]) dlarge = winograd_input_gradient(grad, weight);
      if (output_mask[1]) dweight = winograd_weight_gradient(grad, large);
      if (output_mask[2]) dbias = channel_sums(s, grad);
    } else {
      std::tie(dlarge, dweight, dbias) = at::convolution_backward(
          grad, large, weight, at::OptionalIntArrayRef(weight.sizes().slice(0, 1)), {1, 1}, padding,
          {1, 1}, false, {0, 0}, 1, {output_mask[0], output_mask[1], output_mask[2]});
    }
    if (output_mask[0]) {
      if (x.sizes().slice(2) != size) {
        dlarge = at::upsample_bilinear2d_backward(dlarge, size, x.sizes(), align_corners);
      }
      found[0] = spectralx::laid_out(dlarge, x);
    }
    if (output_mask[1]) found[1] = spectralx::laid_out(dweight, weight);
    if (output_mask[2]) found[2] = spectralx::laid_out(dbias, *bias);
    return wanted();
  }
  SPECTRALX_DISPATCH(type, [&] { grad = channels_last<S, A>(grad.to(type)); });
  if (found[2].defined()) found[2].copy_(channel_sums(s, grad));
  if (!found[0].defined() && !found[1].defined()) return wanted();
  const Tensor small = as_rows(x.to(type)), filters = weight.to(type);
  // Written in place where the layout allows, else copied.
  Tensor dx, dweight;
  if (found[0].defined()) dx = at::empty_like(small);
  if (found[1].defined()) {
    dweight = weight.scalar_type() == type ? found[1] : at::zeros_like(filters);
    if (s.batch == 0) dweight.zero_();
  }
  taps_backward(s, {size, padding, align_corners}, grad, small, filters, dx, dweight);
  if (dx.defined()) {
    found[0].copy_(dx.view({s.batch, s.height, s.width, s.channels}).permute({0, 3, 1, 2}));
  }
  if (dweight.defined() && !dweight.is_same(found[1])) found[1].copy_(dweight);
  return wanted();
}

std::vector<Tensor> upsample_conv2d_moments_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& addend, at::IntArrayRef size,
    at::IntArrayRef padding, bool align_corners, bool by_taps, at::TensorList saved,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 2 && output_mask.size() == 8,
              "output_grads, output_mask: expected 2 and 8 entries");
  c10::List<std::optional<Tensor>> grads;
  grads.push_back(output_grads[0]);
  c10::List<bool> mask = output_mask.copy();
  mask.push_back(false);
  return upsample_conv2d_backward(grads, x, weight, bias, addend, size, padding, align_corners,
                                  by_taps, false, saved, mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("upsample_conv2d", &upsample_conv2d);
  m.impl("upsample_conv2d_backward", &upsample_conv2d_backward);
  m.impl("upsample_conv2d_moments", &upsample_conv2d_moments);
  m.impl("upsample_conv2d_moments_backward", &upsample_conv2d_moments_backward);
}
