// The kernels of kernels.h for the instruction set the whole module is built for.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/refine/kernels_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kBaseline, RefineKernels, float)
SPECTRALX_TABLE(kBaseline, RefineKernels, double)
#if !SPECTRALX_X86_TARGETS
SPECTRALX_TABLE(kBaseline, RefineKernels, c10::BFloat16)
#endif

}  // namespace spectralx::cpu
