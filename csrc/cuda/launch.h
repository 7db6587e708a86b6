// The one way to launch a kernel, so that a .cu file compiles with nvcc and, against
// tests/cuda_on_cpu/shim.h, with a plain C++ compiler. No torch here.
#pragma once

#ifdef SPECTRALX_CUDA_ON_CPU  // the shim was included from the command line
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace spectralx::cuda {

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char spectralx_shared[];
  return spectralx_shared;
}

// 0, or the cudaError_t of a launch that could not be made.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
           cudaStream_t stream, Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  kernel<<<grid, block, shared, stream>>>(arguments...);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace spectralx::cuda

#endif

// A templated kernel goes in parentheses: SPECTRALX_LAUNCH((kernel<float, 4>), grid, ...).
#define SPECTRALX_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ::spectralx::cuda::launch(kernel, grid, block, shared, stream, __VA_ARGS__)
