// What the backends of the reconstruction losses share: checks of shapes, which gradients are handed
// back and, in torch's own operations, those of what training never differentiates, images and masks.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/laid_out.h"
#include "common/patch_norm.h"

namespace spectralx::reconstruction {

using at::Tensor;
using Grads = c10::List<std::optional<Tensor>>;
using Wanted = c10::List<bool>;

// The incoming gradient of the only output; undefined where there is none.
inline Tensor upstream_of(const Grads& output_grads) {
  TORCH_CHECK(output_grads.size() == 1, "output_grads: got ", output_grads.size(), ", expected 1");
  const std::optional<Tensor> grad = output_grads[0];
  return grad.has_value() ? *grad : Tensor();
}

// ---------------------------------------------------------------------------------------------

inline void check_mask(const Tensor& mask, int64_t batch, int64_t cells) {
  TORCH_CHECK_VALUE(mask.sizes() == at::IntArrayRef({batch, cells}), "mask: got shape ",
                    mask.sizes(), ", expected [", batch, ", ", cells, "]");
}

inline void check_patches(const Tensor& prediction, const Tensor& images, const Tensor& mask,
                          int64_t patch) {
  TORCH_CHECK_VALUE(images.dim() == 4 && patch > 0 && images.size(2) % patch == 0 &&
                        images.size(3) % patch == 0 && images.size(1) > 0,
                    "images: got shape ", images.sizes(), ", expected [batch, bands, height, ",
                    "width] of multiples of ", patch);
  const int64_t cells = images.size(2) / patch * (images.size(3) / patch);
  const int64_t values = patch * patch * images.size(1);
  TORCH_CHECK_VALUE(prediction.sizes() == at::IntArrayRef({images.size(0), cells, values}),
                    "prediction: got shape ", prediction.sizes(), ", expected [", images.size(0),
                    ", ", cells, ", ", values, "]");
  check_mask(mask, images.size(0), cells);
}

inline void check_map(const char* name, const Tensor& map, const Tensor& images) {
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) > 0 && images.size(2) > 0 &&
                        images.size(3) > 0,
                    "images: got shape ", images.sizes(),
                    ", expected [batch, bands, height, width] of at least 1");
  TORCH_CHECK_VALUE(map.dim() == 4 && map.size(0) == images.size(0) &&
                        map.size(1) == images.size(1) && map.size(2) > 0 && map.size(3) > 0,
                    name, ": got shape ", map.sizes(), ", expected [", images.size(0), ", ",
                    images.size(1), ", height, width] of at least 1");
}

inline void check_bands(const Tensor& high, const Tensor& low, const Tensor& images,
                        const Tensor& mask, at::IntArrayRef grid, at::IntArrayRef base_size) {
  const auto pair = [](const char* name, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(sizes.size() == 2 && sizes[0] > 0 && sizes[1] > 0, name, ": got ", sizes,
                      ", expected two sizes of at least 1");
  };
  pair("grid", grid), pair("base_size", base_size);
  const auto cut = [&](const char* name, const Tensor& map) {
    check_map(name, map, images);
    TORCH_CHECK_VALUE(map.size(2) % grid[0] == 0 && map.size(3) % grid[1] == 0, name,
                      ": got size [", map.size(2), ", ", map.size(3), "], expected multiples of ",
                      grid);
  };
  cut("high", high), cut("low", low);
  check_mask(mask, images.size(0), grid[0] * grid[1]);
}

// ---------------------------------------------------------------------------------------------

// [B, C, H, W] as patches [B, L, P*P*C], and back.
inline Tensor patchify(const Tensor& images, int64_t patch) {
  const int64_t rows = images.size(2) / patch, columns = images.size(3) / patch;
  return images.reshape({images.size(0), images.size(1), rows, patch, columns, patch})
      .permute({0, 2, 4, 3, 5, 1})
      .reshape({images.size(0), rows * columns, patch * patch * images.size(1)});
}

inline Tensor unpatchify(const Tensor& patches, int64_t patch, at::IntArrayRef sizes) {
  const int64_t rows = sizes[2] / patch, columns = sizes[3] / patch;
  return patches.reshape({sizes[0], rows, columns, patch, patch, sizes[1]})
      .permute({0, 5, 1, 3, 2, 4})
      .reshape(sizes);
}

// Of the images, from that of the prediction: the target's gradient is its negative.
inline Tensor of_patches(const Tensor& prediction_grad, const Tensor& images, int64_t patch,
                         bool normalize) {
  Tensor grad = prediction_grad.neg();
  if (normalize) {
    const Tensor x = patchify(images.to(grad.scalar_type()), patch);
    const int64_t freedom = std::max<int64_t>(x.size(2) - 1, 1);
    const Tensor centred = x - x.mean(2, true);
    const Tensor scale =
        (centred.square().sum(2, true) / static_cast<double>(freedom) + kPatchNormEpsilon).rsqrt();
    const Tensor along = (grad * centred).sum(2, true) / static_cast<double>(freedom);
    grad = scale * (grad - grad.mean(2, true) - centred * along * scale.square());
  }
  return unpatchify(grad, patch, images.sizes());
}

// Resizing is linear in rows and in columns: as matrices [size, length], what it makes of the columns
// of an identity. Their transposes are products, which add without atomics on every device.
struct Resizing {
  Tensor map;  // [1, 1, size, length]

  Resizing(int64_t length, const at::TensorOptions& options)
      : map(at::eye(length, options.memory_format(std::nullopt)).view({1, 1, length, length})) {}
  explicit Resizing(Tensor map_) : map(std::move(map_)) {}

  Resizing nearest(int64_t size) const {
    return Resizing(at::upsample_nearest2d(map, {size, map.size(3)}));
  }
  Resizing averaged(int64_t size) const {
    return Resizing(at::adaptive_avg_pool2d(map, {size, map.size(3)}));
  }
  Resizing bilinear(int64_t size) const {
    return Resizing(at::upsample_bilinear2d(map, {size, map.size(3)}, false));
  }
  Tensor matrix() const { return map[0][0]; }
};

// Of what was resized by `rows` and `columns`.
inline Tensor unresized(const Tensor& grad, const Resizing& rows, const Resizing& columns) {
  return at::matmul(rows.matrix().t(), at::matmul(grad, columns.matrix()));
}

inline Tensor of_resized(const Tensor& prediction_grad, at::IntArrayRef sizes) {
  const auto along = [&](int64_t axis) {
    return Resizing(sizes[axis], prediction_grad.options()).bilinear(prediction_grad.size(axis));
  };
  return unresized(prediction_grad, along(2), along(3)).neg();
}

inline Tensor of_bands(const Tensor& high_grad, const Tensor& low_grad, const Tensor& images,
                       at::IntArrayRef base_size) {
  const auto full = [&](int64_t axis) {
    return Resizing(images.size(axis), high_grad.options()).nearest(high_grad.size(axis));
  };
  const Resizing rows = full(2), columns = full(3);
  const auto base = [&](const Resizing& along, int64_t axis) {
    return along.averaged(base_size[axis - 2]).bilinear(high_grad.size(axis));
  };
  return unresized(high_grad, base(rows, 2), base(columns, 3)) -
         unresized(high_grad, rows, columns) -
         unresized(low_grad, rows.averaged(low_grad.size(2)), columns.averaged(low_grad.size(3)));
}

// Of the mask [B, L]: from errors [B, L], whose weighted sum over that of the mask, `count`, is the
// loss; where nothing is masked the divisor is 1 and does not depend on it.
inline Tensor of_mask(const Tensor& errors, const Tensor& mask) {
  const Tensor count = mask.sum();
  const Tensor none = count == 0;
  const Tensor divisor = at::where(none, at::ones_like(count), count);
  const Tensor loss = (errors * mask).sum() / divisor;
  return (errors - at::where(none, at::zeros_like(loss), loss)) / divisor;
}

// ---------------------------------------------------------------------------------------------
// The gradients wanted of each loss's tensors, in order. `prediction_grad()` is that of the prediction,
// in the type that sums are formed in where that of the images is wanted, `mask_grad()` that of the
// mask; `gradients(high, low)` are those of the two predictions, undefined where not asked for.

template <typename PredictionGrad, typename MaskGrad>
std::vector<Tensor> patch_gradients(const Wanted& wanted, const Tensor& prediction,
                                    const Tensor& images, const Tensor& mask, int64_t patch,
                                    bool normalize, const PredictionGrad& prediction_grad,
                                    const MaskGrad& mask_grad) {
  std::vector<Tensor> grads;
  if (wanted[0] || wanted[1]) {
    const Tensor grad = prediction_grad();
    if (wanted[0]) grads.push_back(laid_out(grad, prediction));
    if (wanted[1]) grads.push_back(laid_out(of_patches(grad, images, patch, normalize), images));
  }
  if (wanted[2]) grads.push_back(laid_out(mask_grad(), mask));
  return grads;
}

template <typename PredictionGrad>
std::vector<Tensor> resized_gradients(const Wanted& wanted, const Tensor& prediction,
                                      const Tensor& images, const PredictionGrad& prediction_grad) {
  const Tensor grad = prediction_grad();
  std::vector<Tensor> grads;
  if (wanted[0]) grads.push_back(laid_out(grad, prediction));
  if (wanted[1]) grads.push_back(laid_out(of_resized(grad, images.sizes()), images));
  return grads;
}

template <typename Gradients, typename MaskGrad>
std::vector<Tensor> band_gradients(const Wanted& wanted, const Tensor& high, const Tensor& low,
                                   const Tensor& images, const Tensor& mask,
                                   at::IntArrayRef base_size, const Gradients& gradients,
                                   const MaskGrad& mask_grad) {
  std::vector<Tensor> grads;
  if (wanted[0] || wanted[1] || wanted[2]) {
    const auto [high_grad, low_grad] = gradients(wanted[0] || wanted[2], wanted[1] || wanted[2]);
    if (wanted[0]) grads.push_back(laid_out(high_grad, high));
    if (wanted[1]) grads.push_back(laid_out(low_grad, low));
    if (wanted[2]) {
      const Tensor same = low_grad.to(high_grad.scalar_type());
      grads.push_back(laid_out(of_bands(high_grad, same, images, base_size), images));
    }
  }
  if (wanted[3]) grads.push_back(laid_out(mask_grad(), mask));
  return grads;
}

}  // namespace spectralx::reconstruction
