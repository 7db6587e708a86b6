// Launches of the pass over upsampled logits and of the confusion matrix.
#include <algorithm>

#include "cuda/common/dispatch.h"
#include "cuda/upsample/kernels.h"
#include "cuda/upsample/prediction.cuh"

namespace {

using namespace spectralx::cuda;

int64_t counts_shared(int64_t classes) {
  return classes <= kSharedCounts ? classes * classes * static_cast<int64_t>(sizeof(int)) : 0;
}

template <typename S>
int run(const SpectralxPrediction& p, cudaStream_t on) {
  using W = Wide<S>;
  const bool aligned = p.align_corners != 0;
  const PredictionSizes<W> sizes{
      {static_cast<int>(p.height), static_cast<int>(p.out_height), aligned},
      {static_cast<int>(p.width), static_cast<int>(p.out_width), aligned},
      static_cast<int>(p.classes),
      static_cast<int>(p.label_type),
      p.ignore_index,
      static_cast<W>(1 - p.label_smoothing),
      static_cast<W>(p.label_smoothing / static_cast<double>(p.classes))};
  const PredictionTensors<S> tensors{as<S>(p.logits),       p.target,
                                     as<W>(p.weight),       as<W>(p.upstream),
                                     as<W>(p.losses),       as<W>(p.probability),
                                     as<W>(p.loss_parts),   as<W>(p.gradient_parts),
                                     as<int64_t>(p.label),  as<int64_t>(p.confusion)};
  const int64_t blocks = spectralx_prediction_blocks(&p);
  // The grid's second dimension.
  if (p.batch > 65535) return kInvalidValue;
  const bool gradient = p.gradient != nullptr;
  if (blocks > 0) {
    const dim3 grid(static_cast<unsigned>(p.height), static_cast<unsigned>(p.batch));
    // The source columns stand behind the values as ints.
    const size_t shared = static_cast<size_t>(prediction_shared(gradient)) * sizeof(W) +
                          static_cast<size_t>(p.confusion ? counts_shared(p.classes) : 0);
    const int error =
        gradient ? SPECTRALX_LAUNCH((prediction_pass<S, true>), grid, kColumns, shared, on, sizes,
                                    tensors)
                 : SPECTRALX_LAUNCH((prediction_pass<S, false>), grid, kColumns, shared, on, sizes,
                                    tensors);
    if (error != 0) return error;
  }
  if (p.loss != nullptr) {
    const int error =
        SPECTRALX_LAUNCH((prediction_loss<W>), 1, 256, 258 * sizeof(W), on, as<W>(p.loss_parts),
                         blocks, p.mean != 0, as<W>(p.loss));
    if (error != 0) return error;
  }
  const int64_t elements = p.batch * p.classes * p.height * p.width;
  if (!gradient || elements == 0) return 0;
  return SPECTRALX_LAUNCH((prediction_gradient<W>), static_cast<unsigned>(ceil_div(elements, 256)),
                          256, 0, on, as<W>(p.gradient_parts), as<W>(p.loss), as<W>(p.factor),
                          sizes.classes, sizes.rows.length, sizes.columns.length, elements,
                          as<W>(p.gradient));
}

}  // namespace

extern "C" {

int64_t spectralx_prediction_blocks(const SpectralxPrediction* p) { return p->batch * p->height; }

int spectralx_prediction(const SpectralxPrediction* p, void* stream) {
  return with_type(static_cast<int>(p->type), [&](auto tag) {
    return run<decltype(tag)>(*p, static_cast<cudaStream_t>(stream));
  });
}

int spectralx_confusion(const void* prediction, int64_t prediction_type, const void* target,
                        int64_t target_type, int64_t pixels, int64_t classes, int64_t ignore_index,
                        void* confusion, void* stream) {
  if (pixels == 0) return 0;
  const int64_t blocks = std::min<int64_t>(ceil_div(pixels, 256), 1024);
  return SPECTRALX_LAUNCH((confusion_counts<int>), static_cast<unsigned>(blocks), 256,
                          static_cast<size_t>(counts_shared(classes)),
                          static_cast<cudaStream_t>(stream), prediction,
                          static_cast<int>(prediction_type), target, static_cast<int>(target_type),
                          pixels, static_cast<int>(classes), ignore_index,
                          static_cast<int64_t*>(confusion));
}
}
