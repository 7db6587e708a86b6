// The kernels of kernels.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/refine/kernels_impl.h"

namespace spectralx::cpu {

const RefineKernels<float>& refine_kernels_avx512() {
  static constexpr RefineKernels<float> kernels = table<float>("AVX-512");
  return kernels;
}

const RefineKernels<c10::BFloat16>& refine_kernels_avx512_bfloat16() {
  static constexpr RefineKernels<c10::BFloat16> kernels = table<c10::BFloat16>("AVX-512");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
