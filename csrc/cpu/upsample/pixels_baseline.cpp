// The kernels of pixels.h for the instruction set the whole module is built for, and the choice.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/upsample/pixels_impl.h"

namespace spectralx::cpu {

const PixelKernels<float>& pixel_kernels_avx2();
const PixelKernels<float>& pixel_kernels_avx512();

namespace {

constexpr PixelKernels<float> kFloat = table<float>("baseline");
constexpr PixelKernels<double> kDouble = table<double>("baseline");

}  // namespace

template <>
const PixelKernels<float>& pixel_kernels<float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return pixel_kernels_avx512();
    case InstructionSet::kAvx2:
      return pixel_kernels_avx2();
#endif
    default:
      return kFloat;
  }
}

template <>
const PixelKernels<double>& pixel_kernels<double>() {
  return kDouble;
}

}  // namespace spectralx::cpu
