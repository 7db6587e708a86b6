// The kernels of attention.h for the instruction set the whole module is built for, and the choice.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/hypert/attention_impl.h"

namespace spectralx::cpu {

const AttentionKernels<float>& attention_kernels_avx2();
const AttentionKernels<float>& attention_kernels_avx512();
const AttentionKernels<c10::BFloat16>& attention_kernels_avx512_bfloat16();

namespace {

constexpr AttentionKernels<float> kFloat = attention_table<float>("baseline");
constexpr AttentionKernels<double> kDouble = attention_table<double>("baseline");

}  // namespace

template <>
const AttentionKernels<float>& attention_kernels<float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return attention_kernels_avx512();
    case InstructionSet::kAvx2:
      return attention_kernels_avx2();
#endif
    default:
      return kFloat;
  }
}

template <>
const AttentionKernels<double>& attention_kernels<double>() {
  return kDouble;
}

// Only where `multiplies_bfloat16`, which implies AVX-512.
template <>
const AttentionKernels<c10::BFloat16>& attention_kernels<c10::BFloat16>() {
#if SPECTRALX_X86_TARGETS
  return attention_kernels_avx512_bfloat16();
#else
  static constexpr AttentionKernels<c10::BFloat16> kernels =
      attention_table<c10::BFloat16>("baseline");
  return kernels;
#endif
}

}  // namespace spectralx::cpu
