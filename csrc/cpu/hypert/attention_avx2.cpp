// The kernels of attention.h for AVX2.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/hypert/attention_impl.h"

namespace spectralx::cpu {

const AttentionKernels<float>& attention_kernels_avx2() {
  static constexpr AttentionKernels<float> kernels = attention_table<float>("AVX2");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
