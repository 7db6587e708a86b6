// spectralx::upsample_cross_entropy and upsample_cross_entropy_argmax on the CPU.
//
// Where a gradient is wanted of a loss that is one number, forward leaves it already, for an incoming
// gradient of one: exponentials are computed once, and backward is a product with that number.
#include "cpu/torch.h"

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/upsample/prediction.h"

namespace {

using at::Tensor;
using spectralx::cpu::accumulation_type;
using spectralx::cpu::PredictionPass;

enum Reduction : int64_t { kNone, kMean, kSum };  // as REDUCTIONS in reference.py

// The arguments that both operators share.
struct Loss {
  const Tensor &logits, &target;
  const std::optional<Tensor>& weight;
  at::IntArrayRef size;
  int64_t ignore_index;
  double label_smoothing;
  int64_t reduction;
  bool align_corners;

  at::TensorOptions wide() const {
    return logits.options().dtype(accumulation_type(logits.scalar_type()));
  }

  PredictionPass pass() const {
    TORCH_CHECK_VALUE(logits.dim() == 4 && logits.size(1) > 0 && logits.size(2) > 0 &&
                          logits.size(3) > 0,
                      "logits: got shape ", logits.sizes(),
                      ", expected [batch, classes, height, width] of at least 1");
    TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, "size: got ", size,
                      ", expected two integers of at least 1");
    TORCH_CHECK_VALUE(target.sizes() == at::IntArrayRef({logits.size(0), size[0], size[1]}),
                      "target: got shape ", target.sizes(), ", expected [", logits.size(0), ", ",
                      size[0], ", ", size[1], "]");
    PredictionPass pass(logits, size, align_corners);
    pass.target = target;
    if (weight.has_value()) {
      TORCH_CHECK_VALUE(weight->sizes() == at::IntArrayRef({logits.size(1)}),
                        "weight: got shape ", weight->sizes(), ", expected [", logits.size(1), "]");
      pass.weight = weight->to(wide().dtype()).contiguous();
    }
    pass.ignore_index = ignore_index;
    pass.label_smoothing = label_smoothing;
    return pass;
  }

  void run(PredictionPass& pass) const {
    pass.run();
    spectralx::cpu::refuse_wrong_labels(pass.wrong, logits.size(1), ignore_index);
  }

  // What the sum over pixels is divided by.
  double divisor(const PredictionPass& pass) const {
    return reduction == kMean && pass.weight_sum != 0 ? pass.weight_sum : 1;
  }

  // The loss and, of a loss that is one number, its gradient; else empty.
  std::tuple<Tensor, Tensor> forward(PredictionPass& pass, bool with_gradient) const {
    const bool whole = reduction != kNone;
    if (!whole) pass.losses = at::empty({logits.size(0), size[0], size[1]}, wide());
    if (whole && with_gradient) pass.gradient = at::empty(logits.sizes(), wide());
    run(pass);
    if (!whole) return {pass.losses.to(logits.scalar_type()), at::empty({0}, wide())};
    const double divisor_ = divisor(pass);
    if (!with_gradient) pass.gradient = at::empty({0}, wide());
    if (divisor_ != 1) pass.gradient.div_(divisor_);
    return {at::scalar_tensor(pass.loss_sum / divisor_, logits.options()), pass.gradient};
  }

  // Gradients of logits and weight, where wanted, for that of the loss.
  std::vector<Tensor> backward(const std::optional<Tensor>& loss_grad, at::TensorList saved,
                               bool want_logits, bool want_weight) const {
    std::vector<Tensor> wanted;
    const bool whole = reduction != kNone;
    const Tensor upstream =
        loss_grad.has_value() && loss_grad->defined()
            ? loss_grad->to(wide().dtype()).contiguous()
            : at::zeros(whole ? at::IntArrayRef() : target.sizes(), wide());
    const double factor = whole ? upstream.item<double>() : 1;
    if (want_logits) {
      Tensor gradient;
      if (whole && !saved.empty() && saved[0].sizes() == logits.sizes()) {
        gradient = saved[0].mul(factor);
      } else {
        PredictionPass again = pass();
        if (!whole) again.upstream = upstream;
        again.gradient = at::empty(logits.sizes(), wide());
        run(again);
        gradient = again.gradient.mul_(factor / divisor(again));
      }
      wanted.push_back(gradient.to(logits.scalar_type()));
    }
    if (want_weight) {
      PredictionPass again = pass();
      if (!whole) again.upstream = upstream;
      again.class_sums = at::zeros({3, logits.size(1)}, wide());
      run(again);
      Tensor gradient = again.class_sums[0] + again.class_sums[1];
      if (reduction == kMean && again.weight_sum != 0) {
        // The divisor depends on weight, too; loss and divisor from the same sums, which cancel.
        const Tensor& counts = again.class_sums[2];
        const Tensor total = again.weight.dot(counts);
        const Tensor mean = again.weight.dot(gradient) / total;
        gradient = (gradient - mean * counts) / total;
      }
      gradient.mul_(factor);
      wanted.push_back(gradient.to(weight->scalar_type()));
    }
    return wanted;
  }
};

std::tuple<Tensor, Tensor> upsample_cross_entropy(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    at::IntArrayRef size, int64_t ignore_index, double label_smoothing, int64_t reduction,
    bool align_corners, bool with_gradient) {
  const Loss loss{logits,       target,          weight,    size,
                  ignore_index, label_smoothing, reduction, align_corners};
  PredictionPass pass = loss.pass();
  return loss.forward(pass, with_gradient);
}

std::vector<Tensor> upsample_cross_entropy_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& logits,
    const Tensor& target, const std::optional<Tensor>& weight, at::IntArrayRef size,
    int64_t ignore_index, double label_smoothing, int64_t reduction, bool align_corners,
    bool /*with_gradient*/, at::TensorList saved, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1, "output_grads: got ", output_grads.size(), ", expected 1");
  TORCH_CHECK(output_mask.size() == 9, "output_mask: got ", output_mask.size(), ", expected 9");
  const Loss loss{logits,       target,          weight,    size,
                  ignore_index, label_smoothing, reduction, align_corners};
  return loss.backward(output_grads[0], saved, output_mask[0], output_mask[2]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_argmax(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& confusion, at::IntArrayRef size, int64_t ignore_index,
    double label_smoothing, int64_t reduction, bool align_corners, bool with_gradient) {
  const Loss loss{logits,       target,          weight,    size,
                  ignore_index, label_smoothing, reduction, align_corners};
  PredictionPass pass = loss.pass();
  pass.label = at::empty(target.sizes(), logits.options().dtype(at::kLong));
  Tensor counted = at::empty({0, 0}, pass.label.options());
  if (confusion.has_value()) {
    const int64_t classes = logits.size(1);
    TORCH_CHECK_TYPE(confusion->scalar_type() == at::kLong, "confusion: got dtype ",
                     confusion->scalar_type(), ", expected int64");
    TORCH_CHECK_VALUE(confusion->sizes() == at::IntArrayRef({classes, classes}),
                      "confusion: got shape ", confusion->sizes(), ", expected [", classes, ", ",
                      classes, "]");
    pass.confusion = counted = confusion->clone(at::MemoryFormat::Contiguous);
  }
  auto [value, gradient] = loss.forward(pass, with_gradient);
  return {value, pass.label, counted, gradient};
}

std::vector<Tensor> upsample_cross_entropy_argmax_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& logits,
    const Tensor& target, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& /*confusion*/, at::IntArrayRef size, int64_t ignore_index,
    double label_smoothing, int64_t reduction, bool align_corners, bool /*with_gradient*/,
    at::TensorList saved, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 3, "output_grads: got ", output_grads.size(), ", expected 3");
  TORCH_CHECK(output_mask.size() == 10, "output_mask: got ", output_mask.size(), ", expected 10");
  const Loss loss{logits,       target,          weight,    size,
                  ignore_index, label_smoothing, reduction, align_corners};
  return loss.backward(output_grads[0], saved, output_mask[0], output_mask[2]);
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("upsample_cross_entropy", &upsample_cross_entropy);
  m.impl("upsample_cross_entropy_backward", &upsample_cross_entropy_backward);
  m.impl("upsample_cross_entropy_argmax", &upsample_cross_entropy_argmax);
  m.impl("upsample_cross_entropy_argmax_backward", &upsample_cross_entropy_argmax_backward);
}
