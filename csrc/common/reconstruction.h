// What the backends of the reconstruction losses share, in torch's own operations: gradients of what
// training never differentiates, images and masks.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace spectralx::reconstruction {

// [B, C, H, W] as patches [B, L, P*P*C], and back.
inline at::Tensor patchify(const at::Tensor& images, int64_t patch) {
  const int64_t rows = images.size(2) / patch, columns = images.size(3) / patch;
  return images.reshape({images.size(0), images.size(1), rows, patch, columns, patch})
      .permute({0, 2, 4, 3, 5, 1})
      .reshape({images.size(0), rows * columns, patch * patch * images.size(1)});
}

inline at::Tensor unpatchify(const at::Tensor& patches, int64_t patch, at::IntArrayRef sizes) {
  const int64_t rows = sizes[2] / patch, columns = sizes[3] / patch;
  return patches.reshape({sizes[0], rows, columns, patch, patch, sizes[1]})
      .permute({0, 5, 1, 3, 2, 4})
      .reshape(sizes);
}

// Of the images, from that of the prediction: the target's gradient is its negative.
inline at::Tensor of_patches(const at::Tensor& prediction_grad, const at::Tensor& images,
                             int64_t patch, bool normalize, double epsilon) {
  at::Tensor grad = prediction_grad.neg();
  if (normalize) {
    const at::Tensor x = patchify(images.to(grad.scalar_type()), patch);
    const int64_t freedom = std::max<int64_t>(x.size(2) - 1, 1);
    const at::Tensor centred = x - x.mean(2, true);
    const at::Tensor scale =
        (centred.square().sum(2, true) / static_cast<double>(freedom) + epsilon).rsqrt();
    const at::Tensor along = (grad * centred).sum(2, true) / static_cast<double>(freedom);
    grad = scale * (grad - grad.mean(2, true) - centred * along * scale.square());
  }
  return unpatchify(grad, patch, images.sizes());
}

inline at::Tensor of_resized(const at::Tensor& prediction_grad, at::IntArrayRef sizes) {
  return at::upsample_bilinear2d_backward(prediction_grad.neg(),
                                          {prediction_grad.size(2), prediction_grad.size(3)}, sizes,
                                          false);
}

// Of the target that averages over areas, and of what it averages; `like` has the latter's size.
inline at::Tensor of_averaged(const at::Tensor& grad, const at::Tensor& like) {
  return at::_adaptive_avg_pool2d_backward(grad, like);
}

inline at::Tensor of_bands(const at::Tensor& high_grad, const at::Tensor& low_grad,
                           const at::Tensor& images, at::IntArrayRef base_size) {
  const int64_t batch = images.size(0), bands = images.size(1);
  const at::Tensor like = at::empty(high_grad.sizes(), high_grad.options());
  at::Tensor full = high_grad.neg();
  full += of_averaged(low_grad.neg(), like);
  const at::Tensor base = at::upsample_bilinear2d_backward(
      high_grad, {high_grad.size(2), high_grad.size(3)}, {batch, bands, base_size[0], base_size[1]},
      false);
  full += of_averaged(base, like);
  return at::upsample_nearest2d_backward(full, {full.size(2), full.size(3)}, images.sizes());
}

// Of the mask [B, L]: from errors [B, L], whose weighted sum over that of the mask, `count`, is the
// loss; where nothing is masked the divisor is 1 and does not depend on it.
inline at::Tensor of_mask(const at::Tensor& errors, const at::Tensor& mask) {
  const at::Tensor count = mask.sum();
  const at::Tensor none = count == 0;
  const at::Tensor divisor = at::where(none, at::ones_like(count), count);
  const at::Tensor loss = (errors * mask).sum() / divisor;
  return (errors - at::where(none, at::zeros_like(loss), loss)) / divisor;
}

}  // namespace spectralx::reconstruction
