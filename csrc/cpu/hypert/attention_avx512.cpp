// The kernels of attention.h for AVX-512.
#include "cpu/instruction_sets.h"

#if SPECTRALX_X86_TARGETS
#define SPECTRALX_BEGIN_TARGET SPECTRALX_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SPECTRALX_END_TARGET SPECTRALX_TARGET_END
#include "cpu/hypert/attention_impl.h"

namespace spectralx::cpu {

const AttentionKernels<float>& attention_kernels_avx512() {
  static constexpr AttentionKernels<float> kernels = attention_table<float>("AVX-512");
  return kernels;
}

const AttentionKernels<c10::BFloat16>& attention_kernels_avx512_bfloat16() {
  static constexpr AttentionKernels<c10::BFloat16> kernels =
      attention_table<c10::BFloat16>("AVX-512");
  return kernels;
}

}  // namespace spectralx::cpu
#endif
