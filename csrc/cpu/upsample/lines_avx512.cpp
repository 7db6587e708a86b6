// The kernels of lines.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/upsample/lines_impl.h"

namespace spectralx::cpu {

const LineKernels<float, float>& line_kernels_float_avx512() {
  static constexpr LineKernels<float, float> kernels = table<float, float>("AVX-512");
  return kernels;
}

const LineKernels<c10::BFloat16, float>& line_kernels_bfloat16_avx512() {
  static constexpr LineKernels<c10::BFloat16, float> kernels =
      table<c10::BFloat16, float>("AVX-512");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
