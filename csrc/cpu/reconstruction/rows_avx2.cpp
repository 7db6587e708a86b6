// The kernels of rows.h for AVX2.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_AVX2
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/reconstruction/rows_impl.h"

namespace spectralx::cpu {

SPECTRALX_TABLE(kAvx2, RowKernels, float)

}  // namespace spectralx::cpu
#endif
