// The kernels of lines.h for the instruction set the whole module is built for, and the choice.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/upsample/lines_impl.h"

namespace spectralx::cpu {

const LineKernels<float, float>& line_kernels_float_avx2();
const LineKernels<float, float>& line_kernels_float_avx512();
const LineKernels<BFloat16, float>& line_kernels_bfloat16_avx2();
const LineKernels<BFloat16, float>& line_kernels_bfloat16_avx512();

namespace {

constexpr LineKernels<float, float> kFloat = table<float, float>("baseline");
constexpr LineKernels<BFloat16, float> kBFloat16 = table<BFloat16, float>("baseline");
constexpr LineKernels<double, double> kDouble = table<double, double>("baseline");

}  // namespace

template <>
const LineKernels<float, float>& line_kernels<float, float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return line_kernels_float_avx512();
    case InstructionSet::kAvx2:
      return line_kernels_float_avx2();
#endif
    default:
      return kFloat;
  }
}

template <>
const LineKernels<BFloat16, float>& line_kernels<BFloat16, float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return line_kernels_bfloat16_avx512();
    case InstructionSet::kAvx2:
      return line_kernels_bfloat16_avx2();
#endif
    default:
      return kBFloat16;
  }
}

template <>
const LineKernels<double, double>& line_kernels<double, double>() {
  return kDouble;
}

}  // namespace spectralx::cpu
