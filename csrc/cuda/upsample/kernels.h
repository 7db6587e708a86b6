// The kernels of this room as torch-free functions on raw device pointers; 0 or a cudaError_t.
// `type` is that of the logits: 0 float, 1 double, 2 bfloat16, 3 half; "wide" pointers are float,
// double for double. Everything is contiguous.
#pragma once
#include <cstdint>

extern "C" {

// One pass over the pixels of upsampled logits. Null pointers: not given, not wanted.
struct SpectralxPrediction {
  int64_t type, label_type;  // of target: 0 int64, 1 int32, 2 int16, 3 uint8
  int64_t batch, classes, height, width, out_height, out_width;
  int64_t align_corners, ignore_index;
  int64_t mean;  // the loss is divided by the weight of the pixels that count
  double label_smoothing;
  const void* logits;    // [B, K, h, w]
  const void* target;    // [B, H, W]; null: no loss
  const void* weight;    // wide [K]
  const void* upstream;  // wide [B, H, W], of the pixels' losses or, without target, of probability
  const void* factor;    // wide [1], of the whole loss
  void* losses;          // wide [B, H, W]
  void* label;           // int64 [B, H, W]
  void* probability;     // wide [B, H, W]
  void* confusion;       // int64 [K, K], added to
  void* loss;            // wide [2]: the loss, and what it was divided by
  void* loss_parts;      // wide [blocks, 2]: needed with `loss`, and with `gradient` of a mean
  void* gradient;        // wide [B, K, h, w]
  void* gradient_parts;  // wide [B, h, 2, K, w], needed with `gradient`
};

// Blocks of the pass, for the size of `loss_parts`.
int64_t spectralx_prediction_blocks(const SpectralxPrediction* pass);
int spectralx_prediction(const SpectralxPrediction* pass, void* stream);

// confusion [K, K], int64, += the counts of `pixels` pixels. types as label_type above.
int spectralx_confusion(const void* prediction, int64_t prediction_type, const void* target,
                        int64_t target_type, int64_t pixels, int64_t classes, int64_t ignore_index,
                        void* confusion, void* stream);
}
