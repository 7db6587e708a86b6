// The kernels of heads.h for the instruction set the whole module is built for.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/reconstruction/heads_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kBaseline, HeadKernels, float, float)
SPECTRALX_TABLE(kBaseline, HeadKernels, c10::BFloat16, float)
SPECTRALX_TABLE(kBaseline, HeadKernels, double, double)

}  // namespace spectralx::cpu
