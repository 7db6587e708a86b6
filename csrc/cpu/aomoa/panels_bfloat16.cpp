// The panel kernels of panels.h on bfloat16, for processors that multiply it: AVX-512 with its conversions.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_AVX512_BF16
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#ifndef __clang__
#include <immintrin.h>
#define SPECTRALX_SHUFFLES  // as in panels_avx512.cpp
#define SPECTRALX_CONVERTS  // float to bfloat16: one instruction for 32 of them
#endif
#include "cpu/aomoa/panels_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kAvx512, PanelKernels, c10::BFloat16)

}  // namespace spectralx::cpu
#endif
