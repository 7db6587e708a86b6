// The panel kernels of panels.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_AVX512
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/aomoa/panels_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kAvx512, PanelKernels, float)
SPECTRALX_TABLE(kAvx512, PanelKernels, c10::BFloat16)

}  // namespace spectralx::cpu
#endif
