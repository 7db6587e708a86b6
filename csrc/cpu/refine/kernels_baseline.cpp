// The kernels of kernels.h for the instruction set the whole module is built for, and the choice.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/refine/kernels_impl.h"

namespace spectralx::cpu {

const RefineKernels<float>& refine_kernels_avx2();
const RefineKernels<float>& refine_kernels_avx512();
const RefineKernels<c10::BFloat16>& refine_kernels_avx512_bfloat16();

namespace {

constexpr RefineKernels<float> kFloat = table<float>("baseline");
constexpr RefineKernels<double> kDouble = table<double>("baseline");

}  // namespace

template <>
const RefineKernels<float>& refine_kernels<float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return refine_kernels_avx512();
    case InstructionSet::kAvx2:
      return refine_kernels_avx2();
#endif
    default:
      return kFloat;
  }
}

template <>
const RefineKernels<double>& refine_kernels<double>() {
  return kDouble;
}

// Only where `multiplies_bfloat16`, which implies AVX-512.
template <>
const RefineKernels<c10::BFloat16>& refine_kernels<c10::BFloat16>() {
#if SPECTRALX_X86_TARGETS
  return refine_kernels_avx512_bfloat16();
#else
  static constexpr RefineKernels<c10::BFloat16> kernels = table<c10::BFloat16>("baseline");
  return kernels;
#endif
}

}  // namespace spectralx::cpu
