// Kernels that prove the shim; test_shim.py launches them. With SHIM_MAIN, a program that writes
// out of bounds where it is told to.
#include "cuda/launch.h"

using spectralx::cuda::dynamic_shared;

__global__ void reverse(float* values) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const unsigned i = threadIdx.x, first = blockIdx.x * blockDim.x;
  shared[i] = values[first + i];
  __syncthreads();
  values[first + i] = shared[blockDim.x - 1 - i];
}

__global__ void forgets_barrier(float* values) {
  __shared__ float shared[64];
  shared[threadIdx.x] = 0.f;
  __syncthreads();
  shared[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void warp_sums(const float* values, float* sums, unsigned* votes, float* shifted) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, warp = i / 32;
  const float mine = values[i];
  float sum = mine;
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  const unsigned vote = __ballot_sync(0xffffffffu, mine > 0.f);
  const int all = __all_sync(0xffffffffu, mine > -100.f), any = __any_sync(0xffffffffu, mine > 99.f);
  shifted[i] = __shfl_up_sync(0xffffffffu, mine, 1) + __shfl_down_sync(0xffffffffu, mine, 2, 8) +
               __shfl_sync(0xffffffffu, mine, 3, 16);
  if (threadIdx.x % 32 == 0) {
    sums[warp] = sum;
    votes[3 * warp] = vote, votes[3 * warp + 1] = all, votes[3 * warp + 2] = any;
  }
}

__global__ void half_a_warp(float* sums) {  // the two halves of a warp meet apart
  const bool low = threadIdx.x < 16;
  const unsigned mask = low ? 0x0000ffffu : 0xffff0000u;
  float sum = static_cast<float>(threadIdx.x);
  for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(mask, sum, distance);
  __syncwarp();
  sums[threadIdx.x] = sum;
}

__global__ void divergent(float* values) {
  if (threadIdx.x < 40) __syncthreads();
  values[threadIdx.x] = 1.f;
}

__global__ void divergent_warp(float* values) {
  if (threadIdx.x != 5) values[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);
}

__global__ void count(int* total, float* largest) {
  atomicAdd(total, 2);
  atomicMax(largest, static_cast<float>(threadIdx.x));
  if (threadIdx.x == 0) atomicCAS(total + 1, 7, static_cast<int>(blockIdx.x + 10));
}

__global__ void unset_shared(float* values) {
  values[threadIdx.x] = reinterpret_cast<float*>(dynamic_shared())[threadIdx.x];
}

__global__ void vectors(const uint4* source, uint4* target) {
  target[threadIdx.x] = source[threadIdx.x];
}

__global__ void convert(const float* values, float* half, float* bfloat16) {
  half[threadIdx.x] = __half2float(__float2half(values[threadIdx.x]));
  bfloat16[threadIdx.x] = __bfloat162float(__float2bfloat16(values[threadIdx.x]));
}

// c [16, 8] += a [16, 16] b [8, 16]^T, both given as bits of T.
template <typename T>
__global__ void tensor_core(const unsigned* a, const unsigned* b, float* c) {
  const unsigned lane = threadIdx.x, row = lane / 4, pair = lane % 4;
  const unsigned left[4] = {a[row * 8 + pair], a[(row + 8) * 8 + pair], a[row * 8 + pair + 4],
                            a[(row + 8) * 8 + pair + 4]};
  const unsigned right[2] = {b[row * 8 + pair], b[row * 8 + pair + 4]};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(row + i / 2 * 8) * 8 + pair * 2 + i % 2];
  spectralx::cuda::mma_m16n8k16<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + pair * 2 + i % 2] = sum[i];
}

__global__ void write_at(float* values, int at) {
  if (threadIdx.x == 0) values[at] = 1.f;
}

__global__ void write_shared_at(int at) {
  reinterpret_cast<float*>(dynamic_shared())[threadIdx.x == 0 ? at : 0] = 1.f;
}

extern "C" {
int run_reverse(float* values, int blocks, int threads) {
  return SPECTRALX_LAUNCH(reverse, blocks, threads, threads * 4, nullptr, values);
}
int run_forgets_barrier(float* values) {
  return SPECTRALX_LAUNCH(forgets_barrier, 1, 64, 0, nullptr, values);
}
int run_warp_sums(const float* values, float* sums, unsigned* votes, float* shifted) {
  return SPECTRALX_LAUNCH(warp_sums, 2, 64, 0, nullptr, values, sums, votes, shifted);
}
int run_half_a_warp(float* sums) {
  return SPECTRALX_LAUNCH(half_a_warp, 1, 32, 0, nullptr, sums);
}
int run_divergent(float* values) {
  return SPECTRALX_LAUNCH(divergent, 1, 64, 0, nullptr, values);
}
int run_divergent_warp(float* values) {
  return SPECTRALX_LAUNCH(divergent_warp, 1, 32, 0, nullptr, values);
}
int run_count(int* total, float* largest) {
  return SPECTRALX_LAUNCH(count, dim3(2, 3), dim3(4, 5, 2), 0, nullptr, total, largest);
}
int run_unset_shared(float* values) {
  return SPECTRALX_LAUNCH(unset_shared, 1, 32, 128, nullptr, values);
}
int run_too_large(float* values) {
  return SPECTRALX_LAUNCH(unset_shared, 1, 1025, 8192, nullptr, values);
}
int run_vectors(const void* source, void* target) {
  return SPECTRALX_LAUNCH(vectors, 1, 8, 0, nullptr, static_cast<const uint4*>(source),
                          static_cast<uint4*>(target));
}
int run_convert(const float* values, float* half, float* bfloat16) {
  return SPECTRALX_LAUNCH(convert, 1, 512, 0, nullptr, values, half, bfloat16);
}
int run_tensor_core(int is_half, const unsigned* a, const unsigned* b, float* c) {
  return is_half ? SPECTRALX_LAUNCH((tensor_core<__half>), 1, 32, 0, nullptr, a, b, c)
                 : SPECTRALX_LAUNCH((tensor_core<__nv_bfloat16>), 1, 32, 0, nullptr, a, b, c);
}
}

#ifdef SHIM_MAIN
// shim_kernels global|shared INDEX: writes there; 16 values are allocated.
int main(int, char** arguments) {
  const int at = std::atoi(arguments[2]);
  if (arguments[1][0] == 's') return SPECTRALX_LAUNCH(write_shared_at, 1, 32, 64, nullptr, at);
  const std::unique_ptr<float[]> values(new float[16]);
  return SPECTRALX_LAUNCH(write_at, 1, 32, 0, nullptr, values.get(), at);
}
#endif
