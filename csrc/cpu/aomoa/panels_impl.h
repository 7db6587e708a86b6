// The panel kernels of panels.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another. Sums run over
// features in a fixed order, in all lanes at once: bits repeat.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/aomoa/panels.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/exponential.h"
#include "cpu/common/operands.h"

namespace {

using spectralx::cpu::kBlock;
using spectralx::cpu::kLogEpsilon;
using spectralx::cpu::kPanel;
using spectralx::cpu::PanelKernels;
using spectralx::cpu::Wide;

#define SPECTRALX_LANES _Pragma("omp simd") for (int64_t n = 0; n < kPanel; ++n)

}  // namespace

#include "cpu/aomoa/panels_layout.h"
#include "cpu/aomoa/panels_norms.h"
#include "cpu/aomoa/panels_experts.h"
#include "cpu/aomoa/panels_weights.h"

namespace {

template <typename Op>
constexpr PanelKernels<Op> table(const char* name) {
  return {name,
          pack<Op>,
          transpose<Op>,
          unpack<Op>,
          unpack_wide<Op>,
          round_row<Op>,
          widen<Op>,
          to_operand<Op>,
          to_features<Op>,
          spread<Op>,
          to_tokens<Op>,
          moments<Op>,
          normalise<Op>,
          norm<Op>,
          affine<Op>,
          norm_backward<Op>,
          bias_relu<Op>,
          relu_backward<Op>,
          gather_operand<Op>,
          gather<Op>,
          combine<Op>,
          combine_backward<Op>,
          mix<Op>,
          unmix<Op>,
          pack_tokens<Op>,
          pack_wide<Op>,
          pack_scaled<Op>,
          add_sums<Op>,
          add_operand_sums<Op>,
          scale_features<Op>,
          scale_tokens<Op>,
          dot_weight<Op>,
          dot_panel<Op>,
          fold<Op>,
          finish_down<Op>,
          add_columns<Op>,
          finish_input<Op>};
}

}  // namespace

SPECTRALX_END_TARGET
