// spectralx::upsample_cross_entropy, upsample_cross_entropy_argmax, upsample_argmax,
// upsample_argmax_probability and confusion_matrix_update on CUDA.
#include <torch/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/common/glue.h"
#include "cuda/upsample/kernels.h"

namespace {

using namespace spectralx::cuda;

enum Reduction : int64_t { kNone, kMean, kSum };  // as REDUCTIONS in reference.py

int64_t label_code(const char* name, const Tensor& labels) {
  switch (labels.scalar_type()) {
    case at::kLong:
      return 0;
    case at::kInt:
      return 1;
    case at::kShort:
      return 2;
    case at::kByte:
      return 3;
    default:
      TORCH_CHECK_TYPE(false, name, ": got dtype ", labels.scalar_type(),
                       ", expected int64, int32, int16 or uint8");
  }
}

// A pass and the tensors its pointers point into.
struct Pass {
  SpectralxPrediction raw{};
  Tensor logits, target, weight, upstream, factor;  // as the kernels read them
  Tensor loss, gradient;
  at::TensorOptions wide;
  at::DimVector pixels;

  Pass(const Tensor& logits_, at::IntArrayRef size, bool align_corners) {
    TORCH_CHECK_VALUE(logits_.dim() == 4 && logits_.size(1) > 0 && logits_.size(2) > 0 &&
                          logits_.size(3) > 0,
                      "logits: got shape ", logits_.sizes(),
                      ", expected [batch, classes, height, width] of at least 1");
    TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, "size: got ", size,
                      ", expected two integers of at least 1");
    logits = logits_.contiguous();
    wide = logits.options().dtype(wide_type(logits));
    pixels = {logits.size(0), size[0], size[1]};
    raw.type = type_code(logits);
    raw.batch = logits.size(0), raw.classes = logits.size(1);
    raw.height = logits.size(2), raw.width = logits.size(3);
    raw.out_height = size[0], raw.out_width = size[1];
    raw.align_corners = align_corners;
    raw.logits = pointer(logits);
  }

  void score(const Tensor& target_, const OptionalTensor& weight_, int64_t ignore_index,
             double label_smoothing, int64_t reduction) {
    TORCH_CHECK_VALUE(target_.sizes() == at::IntArrayRef(pixels), "target: got shape ",
                      target_.sizes(), ", expected ", at::IntArrayRef(pixels));
    TORCH_CHECK_VALUE(!weight_.has_value() || weight_->numel() == raw.classes,
                      "weight: expected [", raw.classes, "]");
    target = target_.contiguous();
    weight = prepared(weight_, wide_type(logits));
    raw.label_type = label_code("target", target);
    raw.target = pointer(target);
    raw.weight = pointer(weight);
    raw.ignore_index = ignore_index;
    raw.label_smoothing = label_smoothing;
    raw.mean = reduction == kMean;
  }

  void want_gradient() { gradient = at::empty(logits.sizes(), wide); }

  // `sums`: the loss as one number, or what a mean is divided by.
  void run(const char* name, bool sums) {
    Tensor loss_parts, gradient_parts;
    if (sums) {
      loss = at::empty({2}, wide);
      loss_parts = at::empty({spectralx_prediction_blocks(&raw), 2}, wide);
    }
    if (gradient.defined()) {
      gradient_parts = at::empty({raw.batch, raw.height, 2, raw.classes, raw.width}, wide);
    }
    raw.loss = pointer(loss), raw.loss_parts = pointer(loss_parts);
    raw.gradient = pointer(gradient), raw.gradient_parts = pointer(gradient_parts);
    raw.upstream = pointer(upstream), raw.factor = pointer(factor);
    check_launch(name, spectralx_prediction(&raw, current_stream()));
  }
};

// The loss and, of a loss that is one number, its gradient if wanted; else empty.
std::tuple<Tensor, Tensor> loss_of(Pass& pass, const char* name, int64_t reduction,
                                   bool with_gradient) {
  const auto type = pass.logits.scalar_type();
  Tensor losses;
  if (reduction == kNone) {
    losses = at::empty(pass.pixels, pass.wide);
    pass.raw.losses = pointer(losses);
    pass.run(name, false);
    return {losses.to(type), at::empty({0}, pass.wide)};
  }
  if (with_gradient) pass.want_gradient();
  pass.run(name, true);
  return {pass.loss[0].to(type).clone(),
          with_gradient ? pass.gradient : at::empty({0}, pass.wide)};
}

std::vector<Tensor> loss_backward(const char* name, Pass& pass, const OptionalTensor& loss_grad,
                                  int64_t reduction, at::TensorList saved, bool want_logits,
                                  bool want_weight) {
  TORCH_CHECK(!want_weight, name, ": weight: got a tensor that requires a gradient, expected none; "
              "backend=\"eager\" differentiates class weights");
  if (!want_logits) return {};
  const auto type = pass.logits.scalar_type();
  if (!loss_grad.has_value() || !loss_grad->defined()) {
    return {at::zeros(pass.logits.sizes(), pass.logits.options())};
  }
  const Tensor upstream = loss_grad->to(wide_type(pass.logits)).contiguous();
  if (reduction == kNone) {
    TORCH_CHECK_VALUE(upstream.sizes() == at::IntArrayRef(pass.pixels),
                      "output_grads: got shape ", upstream.sizes());
    pass.upstream = upstream;
  } else if (!saved.empty() && saved[0].sizes() == pass.logits.sizes()) {
    return {saved[0].mul(upstream).to(type)};
  } else {
    pass.factor = upstream;
  }
  pass.want_gradient();
  pass.run(name, reduction != kNone);
  return {pass.gradient.to(type)};
}

std::tuple<Tensor, Tensor> upsample_cross_entropy(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, at::IntArrayRef size,
    int64_t ignore_index, double label_smoothing, int64_t reduction, bool align_corners,
    bool with_gradient) {
  const c10::cuda::CUDAGuard guard(logits.device());
  Pass pass(logits, size, align_corners);
  pass.score(target, weight, ignore_index, label_smoothing, reduction);
  return loss_of(pass, "upsample_cross_entropy", reduction, with_gradient);
}

std::vector<Tensor> upsample_cross_entropy_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& logits, const Tensor& target,
    const OptionalTensor& weight, at::IntArrayRef size, int64_t ignore_index,
    double label_smoothing, int64_t reduction, bool align_corners, bool /*with_gradient*/,
    at::TensorList saved, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 1 && output_mask.size() == 9,
              "output_grads, output_mask: expected 1 and 9 entries");
  const c10::cuda::CUDAGuard guard(logits.device());
  Pass pass(logits, size, align_corners);
  pass.score(target, weight, ignore_index, label_smoothing, reduction);
  return loss_backward("upsample_cross_entropy_backward", pass, output_grads[0], reduction, saved,
                       output_mask[0], output_mask[2]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> upsample_cross_entropy_argmax(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& confusion, at::IntArrayRef size, int64_t ignore_index,
    double label_smoothing, int64_t reduction, bool align_corners, bool with_gradient) {
  const c10::cuda::CUDAGuard guard(logits.device());
  Pass pass(logits, size, align_corners);
  pass.score(target, weight, ignore_index, label_smoothing, reduction);
  const Tensor label = at::empty(pass.pixels, logits.options().dtype(at::kLong));
  Tensor counted = at::empty({0, 0}, label.options());
  if (confusion.has_value()) {
    TORCH_CHECK_VALUE(confusion->scalar_type() == at::kLong &&
                          confusion->sizes() ==
                              at::IntArrayRef({pass.raw.classes, pass.raw.classes}),
                      "confusion: expected int64 of the number of classes squared");
    counted = confusion->clone(at::MemoryFormat::Contiguous);
    pass.raw.confusion = pointer(counted);
  }
  pass.raw.label = pointer(label);
  auto [loss, gradient] =
      loss_of(pass, "upsample_cross_entropy_argmax", reduction, with_gradient);
  return {loss, label, counted, gradient};
}

std::vector<Tensor> upsample_cross_entropy_argmax_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& logits, const Tensor& target,
    const OptionalTensor& weight, const OptionalTensor& /*confusion*/, at::IntArrayRef size,
    int64_t ignore_index, double label_smoothing, int64_t reduction, bool align_corners,
    bool /*with_gradient*/, at::TensorList saved, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 3 && output_mask.size() == 10,
              "output_grads, output_mask: expected 3 and 10 entries");
  const c10::cuda::CUDAGuard guard(logits.device());
  Pass pass(logits, size, align_corners);
  pass.score(target, weight, ignore_index, label_smoothing, reduction);
  return loss_backward("upsample_cross_entropy_argmax_backward", pass, output_grads[0], reduction,
                       saved, output_mask[0], output_mask[2]);
}

Tensor upsample_argmax(const Tensor& logits, at::IntArrayRef size, bool align_corners) {
  const c10::cuda::CUDAGuard guard(logits.device());
  Pass pass(logits, size, align_corners);
  const Tensor label = at::empty(pass.pixels, logits.options().dtype(at::kLong));
  pass.raw.label = pointer(label);
  pass.run("upsample_argmax", false);
  return label;
}

std::tuple<Tensor, Tensor> upsample_argmax_probability(const Tensor& logits, at::IntArrayRef size,
                                                       bool align_corners) {
  const c10::cuda::CUDAGuard guard(logits.device());
  Pass pass(logits, size, align_corners);
  const Tensor label = at::empty(pass.pixels, logits.options().dtype(at::kLong));
  const Tensor probability = at::empty(pass.pixels, pass.wide);
  pass.raw.label = pointer(label);
  pass.raw.probability = pointer(probability);
  pass.run("upsample_argmax_probability", false);
  return {probability.to(logits.scalar_type()), label};
}

std::vector<Tensor> upsample_argmax_probability_backward(
    const c10::List<OptionalTensor>& output_grads, const Tensor& logits, at::IntArrayRef size,
    bool align_corners, at::TensorList /*saved*/, const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 2 && output_mask.size() == 3,
              "output_grads, output_mask: expected 2 and 3 entries");
  const c10::cuda::CUDAGuard guard(logits.device());
  Pass pass(logits, size, align_corners);
  return loss_backward("upsample_argmax_probability_backward", pass, output_grads[0], kNone, {},
                       output_mask[0], false);
}

Tensor confusion_matrix_update(const Tensor& confusion, const Tensor& prediction,
                               const Tensor& target, int64_t ignore_index) {
  TORCH_CHECK_TYPE(confusion.scalar_type() == at::kLong, "confusion: got dtype ",
                   confusion.scalar_type(), ", expected int64");
  TORCH_CHECK_VALUE(confusion.dim() == 2 && confusion.size(0) == confusion.size(1),
                    "confusion: got shape ", confusion.sizes(), ", expected [classes, classes]");
  TORCH_CHECK_VALUE(target.sizes() == prediction.sizes(), "target: got shape ", target.sizes(),
                    ", expected ", prediction.sizes());
  const c10::cuda::CUDAGuard guard(confusion.device());
  const Tensor predicted = prediction.contiguous(), truth = target.contiguous();
  const Tensor updated = confusion.clone(at::MemoryFormat::Contiguous);
  check_launch("confusion_matrix_update",
               spectralx_confusion(pointer(predicted), label_code("prediction", predicted),
                                   pointer(truth), label_code("target", truth), truth.numel(),
                                   confusion.size(0), ignore_index, pointer(updated),
                                   current_stream()));
  return updated;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CUDA, m) {
  m.impl("upsample_cross_entropy", &upsample_cross_entropy);
  m.impl("upsample_cross_entropy_backward", &upsample_cross_entropy_backward);
  m.impl("upsample_cross_entropy_argmax", &upsample_cross_entropy_argmax);
  m.impl("upsample_cross_entropy_argmax_backward", &upsample_cross_entropy_argmax_backward);
  m.impl("upsample_argmax", &upsample_argmax);
  m.impl("upsample_argmax_probability", &upsample_argmax_probability);
  m.impl("upsample_argmax_probability_backward", &upsample_argmax_probability_backward);
  m.impl("confusion_matrix_update", &confusion_matrix_update);
}
