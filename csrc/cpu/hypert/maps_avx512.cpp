// The kernels of maps.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/hypert/maps_impl.h"

namespace spectralx::cpu {

const MapKernels<float, float>& map_kernels_float_avx512() {
  static constexpr MapKernels<float, float> kernels = table<float, float>("AVX-512");
  return kernels;
}

const MapKernels<c10::BFloat16, float>& map_kernels_bfloat16_avx512() {
  static constexpr MapKernels<c10::BFloat16, float> kernels =
      table<c10::BFloat16, float>("AVX-512");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
