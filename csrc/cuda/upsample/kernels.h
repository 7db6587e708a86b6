// The kernels of this room as torch-free functions on raw device pointers; 0 or a cudaError_t.
// `type` is that of the logits or map: 0 float, 1 double, 2 bfloat16, 3 half; "wide" pointers are
// float, double for double. Everything is contiguous, but for maps that come with strides.
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

// What lies between the products of an upsampled convolution: sum and gather. H' = out_height =
// up_height + 2 row_padding - kernel_rows + 1, W' likewise. Null: not given.
struct SpectralxConvolution {
  int64_t type, batch, channels;  // channels: of the output
  int64_t height, width;          // of the small map
  int64_t up_height, up_width;    // of the upsampled map
  int64_t kernel_rows, kernel_columns, row_padding, column_padding;
  int64_t align_corners, relu;
  int64_t addend_image, addend_channel, addend_row, addend_column;  // strides in elements
  int64_t out_image, out_channel, out_row, out_column;
  void* places;        // spectralx_convolution_places() bytes of scratch, on 16
  const void* z;       // [B, h, w, ky, kx, O]
  const void* bias;    // wide [O]
  const void* addend;  // [B, O, H', W'] by its strides
  void* out;           // [B, O, H', W'] by its strides
  void* parts;         // of moments, wide [spectralx_tap_sum_parts(), 2, O], and with them
  void* counts;        // wide [spectralx_tap_sum_parts()]
  const void* grad;    // [B, H', W', O]
  void* dz;            // [B, h, w, ky, kx, O]
};

int64_t spectralx_convolution_places(const SpectralxConvolution* pass);
// out = relu(sum of z + bias + addend)
int spectralx_tap_sum(const SpectralxConvolution* pass, void* stream);
int64_t spectralx_tap_sum_parts(const SpectralxConvolution* pass);  // z and out as they will be
// dz = the transpose of that sum, of grad
int spectralx_tap_gather(const SpectralxConvolution* pass, void* stream);

// total, wide [channels] = the sum over x [rows, channels]; parts: wide
// [spectralx_channel_parts(rows), channels] of scratch.
int64_t spectralx_channel_parts(int64_t rows);
int spectralx_channel_sums(int64_t type, const void* x, int64_t rows, int64_t channels, void* parts,
                           void* total, void* stream);
}
