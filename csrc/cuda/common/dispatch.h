// From a type code to a storage type S, and from the pointers of kernels.h to typed ones.
#pragma once
#include "cuda/common/scalar.cuh"

namespace spectralx::cuda {

template <typename T>
T* as(void* pointer) {
  return static_cast<T*>(pointer);
}
template <typename T>
const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

template <typename Run>
auto with_type(int type, Run run) {
  switch (type) {
    case kDouble:
      return run(double{});
    case kBFloat16:
      return run(__nv_bfloat16{});
    case kHalf:
      return run(__half{});
    default:
      return run(float{});
  }
}

constexpr int64_t kSharedBudget = 96 * 1024;  // two blocks on an H100's multiprocessor
constexpr int64_t kSharedLimit = 160 * 1024;  // one block on an A100's
constexpr int kInvalidValue = 1;              // cudaErrorInvalidValue

}  // namespace spectralx::cuda
