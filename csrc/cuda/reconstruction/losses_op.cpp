// spectralx::masked_patch_loss, upsampled_l1_loss and band_reconstruction_loss on CUDA. Nothing is kept
// for backward: it makes the targets again.
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "common/reconstruction.h"
#include "cuda/common/glue.h"
#include "cuda/reconstruction/kernels.h"

namespace {

using namespace spectralx::cuda;
namespace reconstruction = spectralx::reconstruction;
using reconstruction::Grads;
using reconstruction::Wanted;

// In the type of the prediction, or in what that is computed in.
Tensor readable(const Tensor& images, const Tensor& prediction) {
  const auto type = images.scalar_type(), wide = wide_type(prediction);
  return (type == prediction.scalar_type() ? images : images.to(wide)).contiguous();
}

int64_t mask_code(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case at::kBool:
    case at::kByte:
      return 4;
    case at::kLong:
      return 5;
    default:
      return type_code(mask);
  }
}

Tensor readable_mask(const Tensor& mask) {
  const auto type = mask.scalar_type();
  const bool narrow = type == at::kInt || type == at::kShort || type == at::kChar;
  return (narrow ? mask.to(at::kLong) : mask).contiguous();
}

// Planar or channels last.
Tensor readable_map(const Tensor& map) {
  return map.is_contiguous(at::MemoryFormat::ChannelsLast) ? map : map.contiguous();
}

// A pass and the tensors its pointers point into.
struct Pass {
  SpectralxErrors raw{};
  Tensor prediction, images, mask;

  Pass(const Tensor& prediction_, const Tensor& images_, const Tensor& mask_)
      : prediction(prediction_), images(images_), mask(mask_) {
    raw.type = type_code(prediction), raw.image_type = type_code(images);
    raw.batch = images.size(0), raw.bands = images.size(1);
    raw.image_height = images.size(2), raw.image_width = images.size(3);
    raw.prediction = pointer(prediction), raw.images = pointer(images);
    if (mask.defined()) raw.mask_type = mask_code(mask), raw.mask = pointer(mask);
  }

  // The prediction as [B, L, patch * patch * bands].
  void as_patches(int64_t patch) {
    raw.height = raw.image_height, raw.width = raw.image_width;
    raw.cell_rows = raw.cell_columns = patch;
    const int64_t values = patch * patch * raw.bands, across = raw.width / patch;
    raw.by_image = raw.height / patch * across * values;
    raw.by_cell_row = across * values, raw.by_cell_column = values;
    raw.by_row = patch * raw.bands, raw.by_column = raw.bands, raw.by_band = 1;
    raw.factor = 1.0 / static_cast<double>(values);
  }

  // As [B, bands, height, width] in cells of so many pixels.
  void as_map(int64_t rows, int64_t columns) {
    raw.height = prediction.size(2), raw.width = prediction.size(3);
    raw.cell_rows = rows, raw.cell_columns = columns;
    raw.by_image = prediction.stride(0), raw.by_band = prediction.stride(1);
    raw.by_row = prediction.stride(2), raw.by_column = prediction.stride(3);
    raw.by_cell_row = rows * raw.by_row, raw.by_cell_column = columns * raw.by_column;
    raw.factor = 1.0 / static_cast<double>(rows * columns);
  }

  at::TensorOptions wide() const {
    return prediction.options().dtype(wide_type(prediction)).memory_format(std::nullopt);
  }

  Tensor want_errors() {
    const Tensor errors = at::empty({raw.batch, spectralx_error_cells(&raw)}, wide());
    raw.errors = pointer(errors);
    return errors;
  }

  // Where every cell counts, whatever its weight.
  Tensor want_all_errors() {
    raw.mask = nullptr;
    return want_errors();
  }

  Tensor want_gradient(const Tensor& upstream, const Tensor& count) {
    const Tensor gradient = at::empty_like(prediction);
    raw.gradient = pointer(gradient), raw.upstream = pointer(upstream), raw.count = pointer(count);
    return gradient;
  }

  Tensor loss(const char* name, const Pass* other = nullptr) const {
    const Tensor out = at::empty({}, prediction.options().memory_format(std::nullopt));
    check_launch(name, spectralx_mean_error(&raw, other != nullptr ? &other->raw : nullptr,
                                            pointer(out), current_stream()));
    return out;
  }
};

// The incoming gradient in the type of the prediction; none is 0.
Tensor upstream_of(const Grads& output_grads, const Tensor& prediction) {
  const auto options = prediction.options().memory_format(std::nullopt);
  const Tensor grad = reconstruction::upstream_of(output_grads);
  return grad.defined() ? grad.to(prediction.scalar_type()) : at::zeros({}, options);
}

// In the type that sums are formed in where the gradient of the images is made of its gradient.
Tensor as_needed(const Tensor& prediction, bool images_wanted) {
  return images_wanted ? prediction.to(wide_type(prediction)) : prediction;
}

Tensor mask_grad(const Tensor& errors, const Tensor& mask, const Tensor& upstream) {
  return reconstruction::of_mask(errors, mask.to(errors.scalar_type())) * upstream;
}

// ---------------------------------------------------------------------------------------------

Pass patch_pass(const Tensor& prediction, const Tensor& images, const Tensor& mask, int64_t patch) {
  reconstruction::check_patches(prediction, images, mask, patch);
  Pass pass(prediction.contiguous(), readable(images, prediction), readable_mask(mask));
  pass.as_patches(patch);
  return pass;
}

Tensor masked_patch_loss(const Tensor& prediction, const Tensor& images, const Tensor& mask,
                         int64_t patch, bool normalize) {
  const char* name = "masked_patch_loss";
  const c10::cuda::CUDAGuard guard(prediction.device());
  Pass pass = patch_pass(prediction, images, mask, patch);
  const Tensor errors = pass.want_errors();
  check_launch(name, spectralx_patch_errors(&pass.raw, normalize, current_stream()));
  return pass.loss(name);
}

std::vector<Tensor> masked_patch_loss_backward(const Grads& output_grads, const Tensor& prediction_,
                                               const Tensor& images, const Tensor& mask,
                                               int64_t patch, bool normalize,
                                               at::TensorList /*saved*/, const Wanted& wanted) {
  const char* name = "masked_patch_loss_backward";
  const c10::cuda::CUDAGuard guard(prediction_.device());
  const Tensor prediction = as_needed(prediction_, wanted[1]);
  const Tensor upstream = upstream_of(output_grads, prediction);
  const Pass pass = patch_pass(prediction, images, mask, patch);
  return reconstruction::patch_gradients(
      wanted, prediction_, images, mask, patch, normalize,
      [&] {
        Pass back = pass;
        const Tensor count = at::empty({}, back.wide());
        check_launch(name, spectralx_mask_count(&back.raw, pointer(count), current_stream()));
        const Tensor gradient = back.want_gradient(upstream, count);
        check_launch(name, spectralx_patch_errors(&back.raw, normalize, current_stream()));
        return gradient;
      },
      [&] {
        Pass all = pass;
        const Tensor errors = all.want_all_errors();
        check_launch(name, spectralx_patch_errors(&all.raw, normalize, current_stream()));
        return mask_grad(errors * all.raw.factor, mask, upstream);
      });
}

// ---------------------------------------------------------------------------------------------

Pass resized_pass(const Tensor& prediction, const Tensor& images) {
  reconstruction::check_map("prediction", prediction, images);
  Pass pass(readable_map(prediction), readable(images, prediction), Tensor());
  // Cells of 32 x 32 pixels: as many values as a patch has of the enlarged image.
  pass.as_map(std::min<int64_t>(32, prediction.size(2)), std::min<int64_t>(32, prediction.size(3)));
  pass.raw.absolute = 1;
  pass.raw.factor = 1.0 / static_cast<double>(std::max<int64_t>(prediction.numel(), 1));
  return pass;
}

Tensor upsampled_l1_loss(const Tensor& prediction, const Tensor& images) {
  const char* name = "upsampled_l1_loss";
  const c10::cuda::CUDAGuard guard(prediction.device());
  Pass pass = resized_pass(prediction, images);
  const Tensor errors = pass.want_errors();
  check_launch(name, spectralx_resized_errors(&pass.raw, current_stream()));
  return pass.loss(name);
}

std::vector<Tensor> upsampled_l1_loss_backward(const Grads& output_grads, const Tensor& prediction_,
                                               const Tensor& images, at::TensorList /*saved*/,
                                               const Wanted& wanted) {
  const c10::cuda::CUDAGuard guard(prediction_.device());
  const Tensor prediction = as_needed(prediction_, wanted[1]);
  const Tensor upstream = upstream_of(output_grads, prediction);
  Pass pass = resized_pass(prediction, images);
  return reconstruction::resized_gradients(wanted, prediction_, images, [&] {
    const Tensor gradient = pass.want_gradient(upstream, Tensor());
    check_launch("upsampled_l1_loss_backward",
                 spectralx_resized_errors(&pass.raw, current_stream()));
    return gradient;
  });
}

// ---------------------------------------------------------------------------------------------

// Both predictions, of one type, and what the target of `high` leaves out.
struct Bands {
  Pass high, low;
  Tensor base, count;

  Bands(const Tensor& high_, const Tensor& low_, const Tensor& images, const Tensor& mask,
        at::IntArrayRef grid, at::IntArrayRef base_size, bool counted)
      : high(readable_map(high_), readable(images, high_), readable_mask(mask)),
        low(readable_map(low_.to(high_.scalar_type())), high.images, high.mask) {
    for (Pass* pass : {&high, &low}) {
      pass->as_map(pass->prediction.size(2) / grid[0], pass->prediction.size(3) / grid[1]);
    }
    base = at::empty({images.size(0), images.size(1), base_size[0], base_size[1]}, high.wide());
    if (counted) count = at::empty({}, high.wide());
    check_launch("band_reconstruction_loss",
                 spectralx_band_base(&high.raw, base_size[0], base_size[1], pointer(base),
                                     pointer(count), current_stream()));
  }

  void run(const char* name) const {
    check_launch(name, spectralx_band_errors(&high.raw, &low.raw, pointer(base), base.size(2),
                                             base.size(3), current_stream()));
  }
};

Tensor band_reconstruction_loss(const Tensor& high, const Tensor& low, const Tensor& images,
                                const Tensor& mask, at::IntArrayRef grid,
                                at::IntArrayRef base_size) {
  const char* name = "band_reconstruction_loss";
  reconstruction::check_bands(high, low, images, mask, grid, base_size);
  const c10::cuda::CUDAGuard guard(high.device());
  Bands bands(high, low, images, mask, grid, base_size, false);
  const Tensor errors = bands.high.want_errors(), more = bands.low.want_errors();
  bands.run(name);
  return bands.high.loss(name, &bands.low);
}

std::vector<Tensor> band_reconstruction_loss_backward(
    const Grads& output_grads, const Tensor& high_, const Tensor& low, const Tensor& images,
    const Tensor& mask, at::IntArrayRef grid, at::IntArrayRef base_size, at::TensorList /*saved*/,
    const Wanted& wanted) {
  const char* name = "band_reconstruction_loss_backward";
  reconstruction::check_bands(high_, low, images, mask, grid, base_size);
  const c10::cuda::CUDAGuard guard(high_.device());
  const Tensor high = as_needed(high_, wanted[2]);
  const Tensor upstream = upstream_of(output_grads, high);
  const Bands bands(high, low, images, mask, grid, base_size, true);
  const auto gradients = [&](bool of_high, bool of_low) {
    Bands back = bands;
    const Tensor high_grad =
        of_high ? back.high.want_gradient(upstream, back.count) : Tensor();
    const Tensor low_grad = of_low ? back.low.want_gradient(upstream, back.count) : Tensor();
    back.run(name);
    return std::pair(high_grad, low_grad);
  };
  return reconstruction::band_gradients(
      wanted, high_, low, images, mask, base_size, gradients, [&] {
        Bands all = bands;
        const Tensor errors = all.high.want_all_errors(), more = all.low.want_all_errors();
        all.run(name);
        return mask_grad(errors * all.high.raw.factor + more * all.low.raw.factor, mask, upstream);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("masked_patch_loss", &masked_patch_loss);
  m.impl("masked_patch_loss_backward", &masked_patch_loss_backward);
  m.impl("upsampled_l1_loss", &upsampled_l1_loss);
  m.impl("upsampled_l1_loss_backward", &upsampled_l1_loss_backward);
  m.impl("band_reconstruction_loss", &band_reconstruction_loss);
  m.impl("band_reconstruction_loss_backward", &band_reconstruction_loss_backward);
}
