// Storage types and the types they are computed in: float for float, bfloat16 and half; double for
// double.
#pragma once
#include "cuda/launch.h"

namespace spectralx::cuda {

enum Type { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };  // as in kernels.h and the tests

template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

__device__ __forceinline__ float wide(float v) { return v; }
__device__ __forceinline__ double wide(double v) { return v; }
__device__ __forceinline__ float wide(__half v) { return __half2float(v); }
__device__ __forceinline__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T narrow(Wide<T> v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double narrow<double>(double v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16(v);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return rsqrt(x); }
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }
__device__ __forceinline__ double softplus(double x) { return x > 20. ? x : log1p(exp(x)); }
__device__ __forceinline__ float normal_cdf(float x) {
  return 0.5f * erfcf(-x * 0.70710678118654752f);
}
__device__ __forceinline__ double normal_cdf(double x) {
  return 0.5 * erfc(-x * 0.70710678118654752);
}
template <typename W>
__device__ __forceinline__ W normal_pdf(W x) {
  return W(0.3989422804014327) * exponential(W(-0.5) * x * x);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Over the 32 lanes, in a fixed order; every lane gets it.
template <typename W>
__device__ __forceinline__ W warp_sum(W value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Over the block's warps, in a fixed order; every thread gets it. `scratch`: a value a warp, which may
// be used again at once.
template <typename W>
__device__ __forceinline__ W block_sum(W value, W* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  W sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) sum += scratch[warp];
  __syncthreads();
  return sum;
}

// 16 bytes of T; consecutive lanes take consecutive packs.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Calls use(i, wide value) for row[i], i in [0, width), each lane for its own i. `packs`: 16-byte
// loads, for an aligned row whose width is a multiple of a pack.
template <typename T, typename Use>
__device__ __forceinline__ void for_row(const T* row, int width, bool packs, int lane, Use use) {
  if (packs) {
    constexpr int kSize = Pack<T>::kSize;
    for (int i = lane * kSize; i < width; i += 32 * kSize) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(row + i);
#pragma unroll
      for (int j = 0; j < kSize; ++j) use(i + j, wide(pack.values[j]));
    }
  } else {
    for (int i = lane; i < width; i += 32) use(i, wide(row[i]));
  }
}

// out[slot] = sum over n of partial[n * slots + slot], over a whole block and in a fixed order that
// depends on the block's size alone. `scratch`: blockDim.x values of shared memory.
template <typename W>
__device__ void ordered_sum(const W* partial, int count, int slots, W* out, W* scratch) {
  const int threads = blockDim.x, tid = threadIdx.x;
  const volatile W* source = partial;  // other blocks wrote it: not from a cache of this one
  const int parts = max(1, threads / slots);
  if (parts == 1) {
    for (int slot = tid; slot < slots; slot += threads) {
      W sum = 0;
      for (int n = 0; n < count; ++n) sum += source[int64_t(n) * slots + slot];
      out[slot] = sum;
    }
    return;
  }
  if (tid < parts * slots) {
    W sum = 0;
    for (int n = tid / slots; n < count; n += parts)
      sum += source[int64_t(n) * slots + tid % slots];
    scratch[tid] = sum;
  }
  __syncthreads();
  if (tid < slots) {
    W sum = 0;
    for (int part = 0; part < parts; ++part) sum += scratch[part * slots + tid];
    out[tid] = sum;
  }
}

}  // namespace spectralx::cuda
