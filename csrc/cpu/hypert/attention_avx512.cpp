// The kernels of attention.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_AVX512
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/hypert/attention_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kAvx512, AttentionKernels, float)
SPECTRALX_TABLE(kAvx512, AttentionKernels, c10::BFloat16)

}  // namespace spectralx::cpu
#endif
