// Where torch.nn.functional.interpolate places the samples of a bilinear upsampling.
#pragma once
#include "cuda/common/scalar.cuh"

namespace spectralx::cuda {

// One axis; coordinates in double.
struct AxisOf {
  int length, size;
  bool align_corners;

  __device__ double at(int i) const {
    if (length == size) return i;
    if (align_corners) return size > 1 ? double(length - 1) / double(size - 1) * i : 0.0;
    return max(double(length) / double(size) * (i + 0.5) - 0.5, 0.0);
  }
  __device__ int first(int i) const { return min(int(at(i)), length - 1); }
  __device__ int second(int i) const {  // the last source again at the end
    const int source = first(i);
    return length == size ? source : min(source + 1, length - 1);
  }
  __device__ double weight(int i) const { return min(max(at(i) - first(i), 0.0), 1.0); }
  // The first position whose first source is `source` or later.
  __device__ int begin(int source) const {
    int low = 0, high = size;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (first(middle) < source) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

}  // namespace spectralx::cuda
