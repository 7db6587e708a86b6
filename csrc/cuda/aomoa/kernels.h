// The kernels of this room as torch-free functions on raw device pointers. Each returns 0 or a
// cudaError_t. `type` is that of the storage pointers (void*): 0 float, 1 double, 2 bfloat16, 3 half;
// "wide" pointers are float, double for double. Everything is contiguous.
#pragma once
#include <cstdint>

extern "C" {

// Blocks of tokens of spectralx_gating_forward; sizes `partial`. 0 where E is too large.
int64_t spectralx_gating_blocks(int type, int64_t tokens, int64_t experts);

// clean, raw_std, noise [A, T, E] of `type` (the latter two null in evaluation) to wide gates
// [A, T, E] and load [A, E]. partial: wide, [A, blocks, E].
int spectralx_gating_forward(int type, const void* clean, const void* raw_std, const void* noise,
                             int64_t attributes, int64_t tokens, int64_t experts, int64_t top_k,
                             void* gates, void* load, void* partial, void* stream);

// gates_grad, load_grad: wide or null; targets of `type` or null.
int spectralx_gating_backward(int type, const void* gates_grad, const void* load_grad,
                              const void* clean, const void* raw_std, const void* noise,
                              int64_t attributes, int64_t tokens, int64_t experts, int64_t top_k,
                              void* clean_grad, void* raw_std_grad, void* noise_grad, void* stream);

// The whole layer, beside the vendor's matrix products. Rows are t A + a; R = T A; d = in / A;
// o = out / A. Pointers a call does not use may be null.
struct SpectralxAomoa {
  int64_t type, tokens, attributes, width, out, rank, hidden, experts, top_k;
  int64_t dense;  // every expert on every row, instead of grouped by expert
  int64_t tile;   // rows of a block: 64, 32, ... 1; 0 chooses
  double eps;
  // Of `type`; noise wide, null in evaluation.
  const void *x, *scaler, *norm1_weight, *norm1_bias, *down, *norm2_weight, *norm2_bias, *gate,
      *gate_noise, *noise, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias, *up;
  // Kept for backward, wide: statistics [3, A, T], normed [R, r].
  void *statistics, *normed;
  // prepare: of `type` folded [r, d], scaled_up [A, o, r]; wide column_sums, shift [r]; int [1].
  void *folded, *scaled_up, *column_sums, *shift, *counter;
  // forward: products [R, r] = x folded^T (wide, the vendor's); mixed [R, r] of `type`; wide gates
  // [A, T, E], load [A, E], load_partial [blocks, A, E].
  void *products, *mixed, *gates, *load, *load_partial;
  // backward, in: mixed_grad [A, T, r] of `type`; wide gates_grad [A, T, E] and load_grad [A, E] or
  // null. K = top_k, or E where dense.
  const void *mixed_grad, *gates_grad, *load_grad;
  // backward, out: `mixed` and, of `type`, normed_grad [R, r] (of x folded^T), hidden_rows and
  // hidden_grad [R, K, h], output_grad [R, K, r], router_grad [R, 2 E]; wide z_grad [R, r] (scratch),
  // noise_grad [A, T, E] or null, row_terms [R, 2], norm_partial [blocks, 4, r]; int16 slots [R, K].
  void *normed_grad, *hidden_rows, *hidden_grad, *output_grad, *router_grad, *z_grad, *noise_grad,
      *row_terms, *norm_partial, *slots;
  // gradients: wide weight_partial [splits, spectralx_aomoa_partial_size]; null where no weight's
  // gradient is wanted but those of scaler and up.
  int64_t splits, row_blocks;  // row_blocks: those of backward
  void* weight_partial;
  // finish, in: wide up_products [A, o, r] = output_grad_a^T mixed_a and down_products [r, d] =
  // normed_grad^T x, the vendor's. Out, of `type`, each or null: x_grad [T, in] (added to) and the
  // gradient of every weight.
  const void *up_products, *down_products;
  void *x_grad, *scaler_grad, *norm1_weight_grad, *norm1_bias_grad, *down_grad, *norm2_weight_grad,
      *norm2_bias_grad, *gate_grad, *gate_noise_grad, *fc1_weight_grad, *fc1_bias_grad,
      *fc2_weight_grad, *fc2_bias_grad, *up_grad;
};

// Blocks of forward. 0 where the sizes exceed a multiprocessor's shared memory.
int64_t spectralx_aomoa_forward_blocks(const SpectralxAomoa* layer);
// statistics may be null: then folded weights only.
int spectralx_aomoa_prepare(const SpectralxAomoa* layer, void* stream);
int spectralx_aomoa_forward(const SpectralxAomoa* layer, void* stream);

int64_t spectralx_aomoa_backward_blocks(const SpectralxAomoa* layer);
// How many parts the rows are cut into for the weights' gradients, and the elements of one part.
int64_t spectralx_aomoa_splits(const SpectralxAomoa* layer);
int64_t spectralx_aomoa_partial_size(const SpectralxAomoa* layer);
int spectralx_aomoa_backward(const SpectralxAomoa* layer, void* stream);   // row by row
int spectralx_aomoa_gradients(const SpectralxAomoa* layer, void* stream);  // parts of the weights'
int spectralx_aomoa_finish(const SpectralxAomoa* layer, void* stream);     // the rest
}
