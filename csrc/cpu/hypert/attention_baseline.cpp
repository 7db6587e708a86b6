// The kernels of attention.h for the instruction set the whole module is built for.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/hypert/attention_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kBaseline, AttentionKernels, float)
SPECTRALX_TABLE(kBaseline, AttentionKernels, double)
#if !SPECTRALX_X86_TARGETS
SPECTRALX_TABLE(kBaseline, AttentionKernels, c10::BFloat16)
#endif

}  // namespace spectralx::cpu
