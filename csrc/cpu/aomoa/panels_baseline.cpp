// The panel kernels of panels.h for the instruction set the whole module is built for, and the choice.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/aomoa/panels_impl.h"

namespace spectralx::cpu {

const PanelKernels<float>& panel_kernels_avx2();
const PanelKernels<float>& panel_kernels_avx512();
const PanelKernels<c10::BFloat16>& panel_kernels_avx512_bfloat16();

namespace {

constexpr PanelKernels<float> kFloat = table<float>("baseline");
constexpr PanelKernels<double> kDouble = table<double>("baseline");

}  // namespace

template <>
const PanelKernels<float>& panel_kernels<float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return panel_kernels_avx512();
    case InstructionSet::kAvx2:
      return panel_kernels_avx2();
#endif
    default:
      return kFloat;
  }
}

template <>
const PanelKernels<double>& panel_kernels<double>() {
  return kDouble;
}

// Only where `multiplies_bfloat16`, which implies AVX-512.
template <>
const PanelKernels<c10::BFloat16>& panel_kernels<c10::BFloat16>() {
#if SPECTRALX_X86_TARGETS
  return panel_kernels_avx512_bfloat16();
#else
  static constexpr PanelKernels<c10::BFloat16> kernels = table<c10::BFloat16>("baseline");
  return kernels;
#endif
}

}  // namespace spectralx::cpu
