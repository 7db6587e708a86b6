// The kernels of rows.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/reconstruction/rows_impl.h"

namespace spectralx::cpu {

const RowKernels<float>& row_kernels_avx512() {
  static constexpr RowKernels<float> kernels = table<float>("AVX-512");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
