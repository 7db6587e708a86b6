// spectralx::masked_patch_loss, upsampled_l1_loss and band_reconstruction_loss on the CPU.
//
// Nothing is kept for backward: it makes the targets again, which costs one more reading of what it
// would have had to read anyway.
#include "cpu/torch.h"

#include <optional>
#include <vector>

#include "common/reconstruction.h"
#include "cpu/common/accumulation.h"
#include "cpu/reconstruction/errors.h"

namespace {

using at::Tensor;
using namespace spectralx::cpu;
namespace reconstruction = spectralx::reconstruction;

using reconstruction::Grads;
using reconstruction::Wanted;

// The incoming gradient; none is 0.
double upstream_of(const Grads& output_grads) {
  const Tensor grad = reconstruction::upstream_of(output_grads);
  return grad.defined() ? grad.item<double>() : 0;
}

Tensor weights_of(const Tensor& mask) { return mask.to(at::kDouble).contiguous(); }

double divisor_of(const Tensor& weights) {
  const double count = weights.sum().item<double>();
  return count == 0 ? 1 : count;
}

// The pass in the accumulation type of the prediction.
template <typename Make>
void run_as(const ErrorPass& pass, const Make& make) {
  if (accumulation_type(pass.prediction.scalar_type()) == at::kDouble) {
    run<double>(pass, [&] { return make(double{}); });
  } else {
    run<float>(pass, [&] { return make(float{}); });
  }
}

// Errors by cell [B, cells]; of every cell, whatever its weight, if `all`.
template <typename Make>
Tensor errors_of(ErrorPass pass, const Make& make, bool all = false) {
  pass.errors = at::empty({pass.pixels.batch, pass.pixels.cells()},
                          pass.prediction.options().dtype(at::kDouble).memory_format(
                              at::MemoryFormat::Contiguous));
  if (all) pass.weight = Tensor();
  run_as(pass, make);
  return pass.errors;
}

// The gradient of the prediction, laid out as the prediction; in the accumulation type if `wide`.
template <typename Make>
Tensor gradient_of(ErrorPass pass, const Make& make, double factor, bool wide) {
  const at::ScalarType type = pass.prediction.scalar_type();
  pass.gradient = at::empty_like(
      pass.prediction, pass.prediction.options().dtype(wide ? accumulation_type(type) : type));
  pass.factor = factor;
  run_as(pass, make);
  return pass.gradient;
}

// ---------------------------------------------------------------------------------------------

struct PatchLoss {
  Tensor images;
  int64_t patch;
  bool normalize;
  ErrorPass pass;
  double length;

  PatchLoss(const Tensor& prediction, const Tensor& images_, const Tensor& mask, int64_t patch_,
            bool normalize_)
      : images(images_.contiguous()), patch(patch_), normalize(normalize_) {
    reconstruction::check_patches(prediction, images, mask, patch);
    pass.pixels = {Layout::kPatches, images.size(0), images.size(1), images.size(2),
                   images.size(3),   patch,          patch};
    length = static_cast<double>(patch * patch * images.size(1));
    pass.prediction = prediction.contiguous();
    pass.weight = weights_of(mask);
  }

  template <typename T>
  std::unique_ptr<Target<T>> operator()(T) const {
    return std::make_unique<PatchTarget<T>>(images, patch, normalize);
  }
};

Tensor masked_patch_loss(const Tensor& prediction, const Tensor& images, const Tensor& mask,
                         int64_t patch, bool normalize) {
  const PatchLoss loss(prediction, images, mask, patch, normalize);
  const Tensor total = (errors_of(loss.pass, loss) * loss.pass.weight).sum();
  return (total / (loss.length * divisor_of(loss.pass.weight))).to(prediction.scalar_type());
}

std::vector<Tensor> masked_patch_loss_backward(const Grads& output_grads, const Tensor& prediction,
                                               const Tensor& images, const Tensor& mask,
                                               int64_t patch, bool normalize,
                                               at::TensorList /*saved*/, const Wanted& wanted) {
  const double upstream = upstream_of(output_grads);
  const PatchLoss loss(prediction, images, mask, patch, normalize);
  return reconstruction::patch_gradients(
      wanted, prediction, images, mask, patch, normalize,
      [&] {
        const double factor = upstream / (loss.length * divisor_of(loss.pass.weight));
        return gradient_of(loss.pass, loss, factor, wanted[1]);
      },
      [&] {
        const Tensor errors = errors_of(loss.pass, loss, true) / loss.length;
        return reconstruction::of_mask(errors, loss.pass.weight) * upstream;
      });
}

// ---------------------------------------------------------------------------------------------

struct L1Loss {
  Tensor images;
  ErrorPass pass;
  int64_t height, width;

  L1Loss(const Tensor& prediction, const Tensor& images_) : images(images_.contiguous()) {
    reconstruction::check_map("prediction", prediction, images);
    // Enough cells for the threads, few enough that a source row is seldom read twice.
    constexpr int64_t kRows = 32;
    height = prediction.size(2), width = prediction.size(3);
    pass.prediction = prediction;
    const Layout layout = layout_of(pass.prediction);
    pass.pixels = {layout, images.size(0), images.size(1), height, width, kRows, width};
    pass.absolute = true;
  }

  double divisor() const {
    return static_cast<double>(std::max<int64_t>(pass.prediction.numel(), 1));
  }

  template <typename T>
  std::unique_ptr<Target<T>> operator()(T) const {
    return std::make_unique<ResizedTarget<T>>(images, height, width);
  }
};

Tensor upsampled_l1_loss(const Tensor& prediction, const Tensor& images) {
  const L1Loss loss(prediction, images);
  return (errors_of(loss.pass, loss).sum() / loss.divisor()).to(prediction.scalar_type());
}

std::vector<Tensor> upsampled_l1_loss_backward(const Grads& output_grads, const Tensor& prediction,
                                               const Tensor& images, at::TensorList /*saved*/,
                                               const Wanted& wanted) {
  const double upstream = upstream_of(output_grads);
  const L1Loss loss(prediction, images);
  return reconstruction::resized_gradients(wanted, prediction, images, [&] {
    return gradient_of(loss.pass, loss, upstream / loss.divisor(), wanted[1]);
  });
}

// ---------------------------------------------------------------------------------------------

struct BandLoss {
  Tensor images, base, weight;
  ErrorPass high, low;

  BandLoss(const Tensor& high_, const Tensor& low_, const Tensor& images_, const Tensor& mask,
           at::IntArrayRef grid, at::IntArrayRef base_size)
      : images(images_.contiguous()) {
    reconstruction::check_bands(high_, low_, images, mask, grid, base_size);
    weight = weights_of(mask);
    high = pass_over(high_, grid);
    low = pass_over(low_, grid);
    make_base(base_size);
  }

  ErrorPass pass_over(const Tensor& prediction, at::IntArrayRef grid) const {
    const int64_t height = prediction.size(2), width = prediction.size(3);
    ErrorPass pass{};
    pass.prediction = prediction;
    const Layout layout = layout_of(pass.prediction);
    pass.pixels = {layout, images.size(0),   images.size(1),  height,
                   width,  height / grid[0], width / grid[1]};
    pass.weight = weight;
    return pass;
  }

  template <typename T>
  std::unique_ptr<AverageTarget<T>> average(int64_t height, int64_t width) const {
    return std::make_unique<AverageTarget<T>>(images, high.prediction.size(2),
                                              high.prediction.size(3), height, width);
  }

  template <typename T>
  void fill_base() const {
    const int64_t bands = images.size(1), height = base.size(2), width = base.size(3);
    T* to = base.mutable_data_ptr<T>();
    at::parallel_for(0, images.size(0) * bands, 1, [&](int64_t begin, int64_t end) {
      const auto target = average<T>(height, width);
      for (int64_t plane = begin; plane < end; ++plane) {
        target->open(plane / bands, 0, height);
        for (int64_t y = 0; y < height; ++y) {
          T* out = to + (plane * height + y) * width;
          const T* values = target->values(plane % bands, y, 0, width, out);
          if (values != out) std::copy_n(values, width, out);
        }
      }
    });
  }

  void make_base(at::IntArrayRef base_size) {
    const at::ScalarType type = accumulation_type(high.prediction.scalar_type());
    base = at::empty({images.size(0), images.size(1), base_size[0], base_size[1]},
                     images.options().dtype(type));
    type == at::kDouble ? fill_base<double>() : fill_base<float>();
  }

  auto high_target() const {
    return [this](auto t) -> std::unique_ptr<Target<decltype(t)>> {
      return std::make_unique<DetailTarget<decltype(t)>>(images, base, high.prediction.size(2),
                                                         high.prediction.size(3));
    };
  }
  auto low_target() const {
    return [this](auto t) -> std::unique_ptr<Target<decltype(t)>> {
      return average<decltype(t)>(low.prediction.size(2), low.prediction.size(3));
    };
  }

  // Errors by cell over the pixels of a cell, of both predictions.
  Tensor errors(bool all) const {
    return errors_of(high, high_target(), all) / pixels(high) +
           errors_of(low, low_target(), all) / pixels(low);
  }
  static double pixels(const ErrorPass& pass) {
    return static_cast<double>(pass.pixels.cell_height * pass.pixels.cell_width);
  }
};

Tensor band_reconstruction_loss(const Tensor& high, const Tensor& low, const Tensor& images,
                                const Tensor& mask, at::IntArrayRef grid,
                                at::IntArrayRef base_size) {
  const BandLoss loss(high, low, images, mask, grid, base_size);
  const Tensor total = (loss.errors(false) * loss.weight).sum();
  return (total / divisor_of(loss.weight)).to(high.scalar_type());
}

std::vector<Tensor> band_reconstruction_loss_backward(
    const Grads& output_grads, const Tensor& high, const Tensor& low, const Tensor& images,
    const Tensor& mask, at::IntArrayRef grid, at::IntArrayRef base_size, at::TensorList /*saved*/,
    const Wanted& wanted) {
  const double upstream = upstream_of(output_grads);
  const BandLoss loss(high, low, images, mask, grid, base_size);
  const auto gradients = [&](bool of_high, bool of_low) {
    const double factor = upstream / divisor_of(loss.weight);
    Tensor high_grad, low_grad;
    if (of_high) {
      high_grad = gradient_of(loss.high, loss.high_target(), factor / BandLoss::pixels(loss.high),
                              wanted[2]);
    }
    if (of_low) {
      low_grad = gradient_of(loss.low, loss.low_target(), factor / BandLoss::pixels(loss.low),
                             wanted[2]);
    }
    return std::pair(high_grad, low_grad);
  };
  return reconstruction::band_gradients(
      wanted, high, low, images, mask, base_size, gradients,
      [&] { return reconstruction::of_mask(loss.errors(true), loss.weight) * upstream; });
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("masked_patch_loss", &masked_patch_loss);
  m.impl("masked_patch_loss_backward", &masked_patch_loss_backward);
  m.impl("upsampled_l1_loss", &upsampled_l1_loss);
  m.impl("upsampled_l1_loss_backward", &upsampled_l1_loss_backward);
  m.impl("band_reconstruction_loss", &band_reconstruction_loss);
  m.impl("band_reconstruction_loss_backward", &band_reconstruction_loss_backward);
}
