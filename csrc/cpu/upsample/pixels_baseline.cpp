// The kernels of pixels.h for the instruction set the whole module is built for.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/upsample/pixels_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kBaseline, PixelKernels, float)
SPECTRALX_TABLE(kBaseline, PixelKernels, double)

}  // namespace spectralx::cpu
