// Kernels with one fault each, for a tool of compute-sanitizer to find; planted.py runs them. The
// argument names the fault; "sound" has none.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

constexpr int kThreads = 128;

__global__ void fill(float* out, int beyond) { out[threadIdx.x + beyond] = 1.f; }

__global__ void turn(const float* in, float* out, bool waits) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = in[threadIdx.x];
  if (waits) __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void meet(float* out, int apart) {
  if (static_cast<int>(threadIdx.x) >= apart) {
    out[threadIdx.x] = 0.f;
    __syncthreads();
  }
  out[threadIdx.x] += 1.f;
}

int main(int count, char** arguments) {
  const char* fault = count > 1 ? arguments[1] : "sound";
  const auto is = [&](const char* name) { return std::strcmp(fault, name) == 0; };
  float *in = nullptr, *out = nullptr;
  if (cudaMalloc(&in, kThreads * sizeof(float)) || cudaMalloc(&out, kThreads * sizeof(float))) {
    std::puts("no memory on the GPU");
    return 2;
  }
  if (!is("initcheck")) cudaMemset(in, 0, kThreads * sizeof(float));
  cudaMemset(out, 0, kThreads * sizeof(float));
  fill<<<1, kThreads>>>(out, is("memcheck") ? 1 : 0);
  turn<<<1, kThreads>>>(in, out, !is("racecheck"));
  meet<<<1, kThreads>>>(out, is("synccheck") ? 16 : 0);
  const cudaError_t status = cudaDeviceSynchronize();
  std::printf("%s: %s\n", fault, cudaGetErrorString(status));
  return 0;
}
