// The kernels of maps.h for AVX2.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/hypert/maps_impl.h"

namespace spectralx::cpu {

const MapKernels<float, float>& map_kernels_float_avx2() {
  static constexpr MapKernels<float, float> kernels = table<float, float>("AVX2");
  return kernels;
}

const MapKernels<c10::BFloat16, float>& map_kernels_bfloat16_avx2() {
  static constexpr MapKernels<c10::BFloat16, float> kernels =
      table<c10::BFloat16, float>("AVX2");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
