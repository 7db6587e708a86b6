// Statistics of the channels of rows [rows, channels], and batch norm on them, as torch-free functions
// on raw device pointers; 0 or a cudaError_t. `type`: 0 float, 1 double, 2 bfloat16, 3 half; "wide"
// pointers are float, double for double. Everything is contiguous.
#pragma once
#include <cstdint>

extern "C" {

// Moments by part, mean and squared deviations, become mean and biased variance, wide [2, channels].
// parts [count + spectralx_moment_groups(count), 2, channels] and counts as long: what is behind
// `count` is scratch.
int64_t spectralx_moment_groups(int64_t count);
int spectralx_join_moments(int64_t type, void* parts, void* counts, int64_t count, int64_t channels,
                           void* moments, void* stream);
// The same of x [rows, channels], by spectralx_moment_parts(rows) parts.
int64_t spectralx_moment_parts(int64_t rows);
int spectralx_channel_moments(int64_t type, const void* x, int64_t rows, int64_t channels,
                              void* parts, void* counts, void* moments, void* stream);

// Batch norm of x [rows, channels] and what follows it.
struct SpectralxNorm {
  int64_t type, rows, channels;
  int64_t activation;  // 0: none, 1: ReLU, 2: GELU
  double eps;
  const void* x;
  const void* grad;     // of the output
  const void* moments;  // wide [2, channels]: mean and biased variance; null: no norm
  const void* weight;   // wide [channels]
  const void* scale;    // wide [channels], weight / sqrt(variance + eps), in its place; or null
  const void* bias;     // wide [channels]
  const void* totals;   // wide [2, channels], of spectralx_norm_sums; null: moments are constants
  const void* skip;     // [rows, channels], added to the output; or null
  void* out;            // [rows, channels]: the output, or the gradient of x; may be x, grad or skip
};

int spectralx_normalize(const SpectralxNorm* pass, void* stream);
// sums, wide [2, channels]: of dz and of dz times x as normalised; parts:
// wide [spectralx_moment_parts(rows), 2, channels] of scratch.
int spectralx_norm_sums(const SpectralxNorm* pass, void* parts, void* sums, void* stream);
int spectralx_norm_gradient(const SpectralxNorm* pass, void* stream);
}
