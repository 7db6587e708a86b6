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
}
