// The kernels of maps.h for the instruction set the whole module is built for, and the choice.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/hypert/maps_impl.h"

namespace spectralx::cpu {

const MapKernels<float, float>& map_kernels_float_avx2();
const MapKernels<float, float>& map_kernels_float_avx512();
const MapKernels<BFloat16, float>& map_kernels_bfloat16_avx2();
const MapKernels<BFloat16, float>& map_kernels_bfloat16_avx512();

namespace {

constexpr MapKernels<float, float> kFloat = table<float, float>("baseline");
constexpr MapKernels<BFloat16, float> kBFloat16 = table<BFloat16, float>("baseline");
constexpr MapKernels<double, double> kDouble = table<double, double>("baseline");

}  // namespace

template <>
const MapKernels<float, float>& map_kernels<float, float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return map_kernels_float_avx512();
    case InstructionSet::kAvx2:
      return map_kernels_float_avx2();
#endif
    default:
      return kFloat;
  }
}

template <>
const MapKernels<BFloat16, float>& map_kernels<BFloat16, float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return map_kernels_bfloat16_avx512();
    case InstructionSet::kAvx2:
      return map_kernels_bfloat16_avx2();
#endif
    default:
      return kBFloat16;
  }
}

template <>
const MapKernels<double, double>& map_kernels<double, double>() {
  return kDouble;
}

}  // namespace spectralx::cpu
