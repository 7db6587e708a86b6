// The kernels of heads.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_AVX512
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/reconstruction/heads_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kAvx512, HeadKernels, float, float)
SPECTRALX_TABLE(kAvx512, HeadKernels, c10::BFloat16, float)

}  // namespace spectralx::cpu
#endif
