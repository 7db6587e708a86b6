// The kernels of rows.h for the instruction set the whole module is built for, and the choice.
#include "cpu/instruction_sets.h"

#define SPECTRALX_BEGIN_TARGET
#define SPECTRALX_END_TARGET
#include "cpu/reconstruction/rows_impl.h"

namespace spectralx::cpu {

const RowKernels<float>& row_kernels_avx2();
const RowKernels<float>& row_kernels_avx512();

namespace {

constexpr RowKernels<float> kFloat = table<float>("baseline");
constexpr RowKernels<double> kDouble = table<double>("baseline");

}  // namespace

template <>
const RowKernels<float>& row_kernels<float>() {
  switch (instruction_set()) {
#if SPECTRALX_X86_TARGETS
    case InstructionSet::kAvx512:
      return row_kernels_avx512();
    case InstructionSet::kAvx2:
      return row_kernels_avx2();
#endif
    default:
      return kFloat;
  }
}

template <>
const RowKernels<double>& row_kernels<double>() {
  return kDouble;
}

}  // namespace spectralx::cpu
