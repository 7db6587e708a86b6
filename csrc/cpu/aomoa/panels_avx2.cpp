// The panel kernels of panels.h for AVX2.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/aomoa/panels_impl.h"

namespace spectralx::cpu {

const PanelKernels<float>& panel_kernels_avx2() {
  static constexpr PanelKernels<float> kernels = table<float>("AVX2");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
