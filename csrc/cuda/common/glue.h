// Between torch's tensors and the raw pointers of a room's kernels.h.
#pragma once
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

namespace spectralx::cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int type_code(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return 0;
    case at::kDouble:
      return 1;
    case at::kBFloat16:
      return 2;
    case at::kHalf:
      return 3;
    default:
      TORCH_CHECK(false, "dtype: got ", tensor.scalar_type(),
                  ", expected float32, float64, bfloat16 or float16");
  }
}

inline at::ScalarType wide_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_launch(const char* name, int status) {
  TORCH_CHECK(status == 0, name, ": launch failed, ",
              cudaGetErrorString(static_cast<cudaError_t>(status)));
}

inline void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline Tensor prepared(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor.has_value() && tensor->defined() ? tensor->to(type).contiguous() : Tensor();
}

inline void* pointer(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

}  // namespace spectralx::cuda
