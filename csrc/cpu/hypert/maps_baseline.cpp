// The kernels of maps.h for the instruction set the whole module is built for.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/hypert/maps_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kBaseline, MapKernels, float, float)
SPECTRALX_TABLE(kBaseline, MapKernels, c10::BFloat16, float)
SPECTRALX_TABLE(kBaseline, MapKernels, double, double)

}  // namespace spectralx::cpu
