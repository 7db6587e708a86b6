// The kernels of rows.h for the instruction set the whole module is built for.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/reconstruction/rows_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kBaseline, RowKernels, float)
SPECTRALX_TABLE(kBaseline, RowKernels, double)

}  // namespace spectralx::cpu
