// The kernels of lines.h for the instruction set the whole module is built for.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/upsample/lines_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kBaseline, LineKernels, float, float)
SPECTRALX_TABLE(kBaseline, LineKernels, c10::BFloat16, float)
SPECTRALX_TABLE(kBaseline, LineKernels, double, double)

}  // namespace spectralx::cpu
