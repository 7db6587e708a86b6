// 3 x 3 convolutions of maps that are not resized by F(2 x 2, 3 x 3), see winograd.cpp.
#pragma once

#include "cpu/upsample/maps.h"

namespace spectralx::cpu {

// Whether a convolution with this padding, of a map that keeps its size, runs faster so than by the
// library: float, and enough channels and pixels.
bool winograd_takes(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef padding);

// [B, O, H, W], channels last.
at::Tensor winograd_forward(const at::Tensor& x, const at::Tensor& weight);
// Gradients of x, channels last, and of weight.
at::Tensor winograd_input_gradient(const at::Tensor& grad, const at::Tensor& weight);
at::Tensor winograd_weight_gradient(const at::Tensor& grad, const at::Tensor& x);

}  // namespace spectralx::cpu
