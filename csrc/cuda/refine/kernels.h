// The kernels of this room as torch-free functions on raw device pointers; 0 or a cudaError_t.
// `type` is that of tokens, queries and keys: 0 float, 1 double, 2 bfloat16, 3 half; "wide" pointers
// are float, double for double. Everything is contiguous but tokens [B, N, H], whose rows have
// strides. Null: not given, not wanted. match: int64 [B, K].
#pragma once
#include <cstdint>

extern "C" {

struct SpectralxMatch {
  int64_t type, batch, rows, count, width;
  double scale;
  const void* queries;  // [B, rows, width]
  const void* keys;     // [B, count, width]
  void* peaks;          // wide [B, spectralx_match_splits(), rows] of scratch
  void* totals;         // the same
  void* match;          // int64 [B, count]
};

int64_t spectralx_match_splits(const SpectralxMatch* pass);
int spectralx_match(const SpectralxMatch* pass, void* stream);

struct SpectralxRows {
  int64_t type, batch, count, keys, width;  // tokens [B, count, width]
  int64_t by_image, by_row;                 // strides of tokens, in elements
  double eps;
  const void* tokens;
  const void* weight;   // [width]
  const void* bias;     // [width]
  const void* match;    // null: every token once, keys = count
  void* out;            // [B, keys, width]
  const void* grad;     // wide [B, count, width]: of the normed tokens
  void* tokens_grad;    // [B, count, width]
  void* parts;          // wide [spectralx_norm_blocks(), 2, width]: shares of weight's, bias's
};

// out = the layer norm of tokens at match
int spectralx_norm_rows(const SpectralxRows* pass, void* stream);
int64_t spectralx_norm_blocks(const SpectralxRows* pass);
// From grad: tokens_grad, and the parts.
int spectralx_norm_rows_backward(const SpectralxRows* pass, void* stream);

// summed [B, count, columns] = for each token the sum of the rows of from [B or, with by_image 0, 1,
// keys, columns] that match it. `wide`: summed is wide, else of `type`.
int spectralx_sum_by_token(int64_t type, const void* from, int64_t by_image, const void* match,
                           int64_t batch, int64_t count, int64_t keys, int64_t columns,
                           int64_t wide, void* summed, void* stream);
// columns, wide [keys, width] = the sum over images of from [B, count, width] at match
int spectralx_sum_over_images(int64_t type, const void* from, const void* match, int64_t batch,
                              int64_t count, int64_t keys, int64_t width, void* columns,
                              void* stream);

struct SpectralxWeigh {
  int64_t type, tokens_count, half;  // tokens [tokens_count, 2 half]
  const void* tokens;
  const void* spatial;   // [tokens_count]
  const void* spectral;  // [tokens_count]
  const void* scale;     // [1]
  void* out;             // as tokens
  const void* grad;      // as tokens
  void* tokens_grad;     // as tokens
  void* spatial_grad;    // [tokens_count]
  void* spectral_grad;   // [tokens_count]
  void* parts;           // wide [tokens_count, 2]: shares of scale's gradient
};

int spectralx_weigh(const SpectralxWeigh* pass, void* stream);
int spectralx_weigh_backward(const SpectralxWeigh* pass, void* stream);
}
