// The kernels of rows.h for AVX2.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/reconstruction/rows_impl.h"

namespace spectralx::cpu {

const RowKernels<float>& row_kernels_avx2() {
  static constexpr RowKernels<float> kernels = table<float>("AVX2");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
