// The kernels of lines.h for AVX2.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/upsample/lines_impl.h"

namespace spectralx::cpu {

const LineKernels<float, float>& line_kernels_float_avx2() {
  static constexpr LineKernels<float, float> kernels = table<float, float>("AVX2");
  return kernels;
}

const LineKernels<c10::BFloat16, float>& line_kernels_bfloat16_avx2() {
  static constexpr LineKernels<c10::BFloat16, float> kernels =
      table<c10::BFloat16, float>("AVX2");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
