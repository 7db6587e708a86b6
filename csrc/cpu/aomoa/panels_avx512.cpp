// The panel kernels of panels.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_AVX512
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#ifndef __clang__
#include <immintrin.h>
#define SPECTRALX_SHUFFLES  // of a vector's lanes by numbers known at run time: one instruction
#endif
#include "cpu/aomoa/panels_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kAvx512, PanelKernels, float)

}  // namespace spectralx::cpu
#endif
