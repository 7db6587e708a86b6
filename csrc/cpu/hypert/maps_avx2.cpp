// The kernels of maps.h for AVX2.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_AVX2
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/hypert/maps_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kAvx2, MapKernels, float, float)
SPECTRALX_TABLE(kAvx2, MapKernels, c10::BFloat16, float)

}  // namespace spectralx::cpu
#endif
