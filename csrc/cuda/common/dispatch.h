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

// Null is on 16 bytes too.
inline bool on_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Blocks for `count`, of which one takes `each`.
inline unsigned blocks_of(int64_t count, int64_t each) {
  return static_cast<unsigned>(ceil_div(count, each));
}

constexpr int64_t kSharedBudget = 96 * 1024;  // two blocks on an H100's multiprocessor
constexpr int64_t kSharedLimit = 160 * 1024;  // one block on an A100's
constexpr int kInvalidValue = 1;              // cudaErrorInvalidValue

}  // namespace spectralx::cuda
