// In place of torch's: one stream, which is none.
#pragma once

using cudaError_t = int;
inline const char* cudaGetErrorString(cudaError_t) { return "see spectralx_shim_error()"; }

namespace c10::cuda {
struct CUDAStream {
  void* stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream() { return {}; }
}  // namespace c10::cuda
