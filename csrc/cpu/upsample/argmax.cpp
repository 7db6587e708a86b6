// spectralx::upsample_argmax, with and without the probability, and confusion_matrix_update on the CPU.
#include "cpu/torch.h"

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/accumulation.h"
#include "cpu/upsample/prediction.h"

namespace {

using at::Tensor;
using spectralx::cpu::accumulation_type;
using spectralx::cpu::PredictionPass;
using spectralx::cpu::WrongValues;

PredictionPass pass_over(const Tensor& logits, at::IntArrayRef size, bool align_corners) {
  TORCH_CHECK_VALUE(logits.dim() == 4 && logits.size(1) > 0 && logits.size(2) > 0 &&
                        logits.size(3) > 0,
                    "logits: got shape ", logits.sizes(),
                    ", expected [batch, classes, height, width] of at least 1");
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, "size: got ", size,
                    ", expected two integers of at least 1");
  return PredictionPass(logits, size, align_corners);
}

Tensor upsample_argmax(const Tensor& logits, at::IntArrayRef size, bool align_corners) {
  PredictionPass pass = pass_over(logits, size, align_corners);
  pass.label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kLong));
  pass.run();
  return pass.label;
}

std::tuple<Tensor, Tensor> upsample_argmax_probability(const Tensor& logits, at::IntArrayRef size,
                                                       bool align_corners) {
  PredictionPass pass = pass_over(logits, size, align_corners);
  const auto wide = logits.options().dtype(accumulation_type(logits.scalar_type()));
  pass.label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kLong));
  pass.probability = at::empty(pass.label.sizes(), wide);
  pass.run();
  return {pass.probability.to(logits.scalar_type()), pass.label};
}

std::vector<Tensor> upsample_argmax_probability_backward(
    const c10::List<std::optional<Tensor>>& output_grads, const Tensor& logits,
    at::IntArrayRef size, bool align_corners, at::TensorList /*saved*/,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK(output_grads.size() == 2, "output_grads: got ", output_grads.size(), ", expected 2");
  if (!output_mask[0]) return {};
  const std::optional<Tensor> upstream = output_grads[0];
  if (!upstream.has_value() || !upstream->defined()) return {at::zeros(logits.sizes(), logits.options())};
  PredictionPass pass = pass_over(logits, size, align_corners);
  const auto wide = logits.options().dtype(accumulation_type(logits.scalar_type()));
  TORCH_CHECK_VALUE(upstream->sizes() == at::IntArrayRef({logits.size(0), size[0], size[1]}),
                    "output_grads: got shape ", upstream->sizes(), ", expected [", logits.size(0),
                    ", ", size[0], ", ", size[1], "]");
  pass.upstream = upstream->to(wide.dtype()).contiguous();
  pass.gradient = at::empty(logits.sizes(), wide);
  pass.run();
  return {pass.gradient.to(logits.scalar_type())};
}

constexpr int64_t kBlock = 2048;  // pixels whose labels are widened at a time

void read_block(const char* name, const Tensor& labels, int64_t begin, int64_t count, int64_t* to) {
  spectralx::cpu::with_label_type(name, labels, [&](auto tag) {
    const auto* from = labels.const_data_ptr<decltype(tag)>() + begin;
    std::copy_n(from, count, to);
  });
}

Tensor confusion_matrix_update(const Tensor& confusion, const Tensor& prediction,
                               const Tensor& target, int64_t ignore_index) {
  TORCH_CHECK_TYPE(confusion.scalar_type() == at::kLong, "confusion: got dtype ",
                   confusion.scalar_type(), ", expected int64");
  TORCH_CHECK_VALUE(confusion.dim() == 2 && confusion.size(0) == confusion.size(1),
                    "confusion: got shape ", confusion.sizes(), ", expected [classes, classes]");
  TORCH_CHECK_VALUE(target.sizes() == prediction.sizes(), "target: got shape ", target.sizes(),
                    ", expected ", prediction.sizes());
  const int64_t classes = confusion.size(0), pixels = target.numel();
  const Tensor predicted = prediction.contiguous(), truth = target.contiguous();
  const Tensor updated = confusion.clone(at::MemoryFormat::Contiguous);
  WrongValues wrong_truth, wrong_prediction;
  std::mutex merging;
  // A matrix of its own for every thread has to pay.
  const int64_t grain = std::max<int64_t>(32768, classes * classes);
  at::parallel_for(0, pixels, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> counts(classes * classes, 0);
    std::array<int64_t, kBlock> rows, columns;
    WrongValues truth_seen, prediction_seen;
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      read_block("target", truth, first, count, rows.data());
      read_block("prediction", predicted, first, count, columns.data());
      for (int64_t i = 0; i < count; ++i) {
        if (rows[i] == ignore_index) continue;
        const bool known = rows[i] >= 0 && rows[i] < classes;
        const bool predictable = columns[i] >= 0 && columns[i] < classes;
        if (known && predictable) {
          ++counts[rows[i] * classes + columns[i]];
        } else {
          if (!known) truth_seen.see(rows[i]);
          if (!predictable) prediction_seen.see(columns[i]);
        }
      }
    }
    const std::lock_guard<std::mutex> guard(merging);  // integers: the order does not matter
    auto* to = updated.mutable_data_ptr<int64_t>();
    for (size_t i = 0; i < counts.size(); ++i) to[i] += counts[i];
    wrong_truth.see(truth_seen);
    wrong_prediction.see(prediction_seen);
  });
  spectralx::cpu::refuse_wrong_labels(wrong_truth, classes, ignore_index);
  TORCH_CHECK_VALUE(!wrong_prediction.any(), "prediction: got class ", wrong_prediction.named(),
                    ", expected 0 to ", classes - 1);
  return updated;
}

}  // namespace

TORCH_LIBRARY_IMPL(spectralx, CPU, m) {
  m.impl("upsample_argmax", &upsample_argmax);
  m.impl("upsample_argmax_probability", &upsample_argmax_probability);
  m.impl("upsample_argmax_probability_backward", &upsample_argmax_probability_backward);
  m.impl("confusion_matrix_update", &confusion_matrix_update);
}
