// A gradient in the layout that its input's gradient has.
#pragma once

#include <ATen/ATen.h>

namespace spectralx {

// `grad` in the type of `input`, laid out as `torch.empty_like` of it is; itself where it is that.
inline at::Tensor laid_out(const at::Tensor& grad, const at::Tensor& input) {
  const at::Tensor to = at::empty_like(input, input.options().device(at::kMeta));
  if (grad.strides() == to.strides() && grad.scalar_type() == input.scalar_type()) return grad;
  return at::empty_like(input).copy_(grad);
}

}  // namespace spectralx
