// Passes of the prediction heads over channels-last maps, on the calling thread.
//
// Compiled once for each instruction set (heads_*.cpp) and chosen at run time.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

enum class Activation { kNone, kGelu, kRelu, kLeakyRelu };

// after(norm(before(x))) of a row of channels.
template <typename A>
struct RowNorm {
  const A *weight, *bias;  // [channels]; null: no norm between the activations
  A eps;
  Activation before, after;
  int64_t channels;
};

// S is what maps hold, A what is computed in: float for float and bfloat16. Rows are dense, and a line
// is a row of pixels of a map.
template <typename S, typename A>
struct HeadKernels {
  const char* instruction_set;

  // out = after(norm(before(x))) + scale addend; addend may be null. scratch: [channels].
  void (*norm)(const S* x, const S* addend, int64_t rows, const RowNorm<A>& norm, A scale,
               A* scratch, S* out);

  // x_grad, and weight_grad and bias_grad [channels] added to; null: not wanted. scratch: [3, channels].
  void (*norm_gradient)(const S* grad, const S* x, int64_t rows, const RowNorm<A>& norm, A* scratch,
                        S* x_grad, A* weight_grad, A* bias_grad);

  // v = sums [rows, channels] + bias: out = GELU(v), rows `stride` apart; slope = its derivative at v, may
  // be null, dense.
  void (*biased_gelu)(const A* sums, const A* bias, int64_t rows, int64_t channels, int64_t stride,
                      S* out, S* slope);

  // out = sums + bias.
  void (*biased)(const A* sums, const A* bias, int64_t count, S* out);

  // out = grad slope.
  void (*scaled)(const A* grad, const S* slope, int64_t count, S* out);
  void (*scaled_map)(const S* grad, const S* slope, int64_t count, S* out);

  // GELU of x [pixels, 2 channels], in out [pixels, 2, channels]: first those of the even channels, so
  // that the two that a grouped convolution adds lie in vectors of their own. slope, may be null, is
  // the derivative at x, as x lies. scratch: [2 channels].
  void (*split_gelu)(const S* x, int64_t pixels, int64_t channels, A* scratch, S* out, S* slope);

  // Pixels [first, last) of a line of GELU(v), `stride` apart in `out`: v = bias + a 3x3 convolution in
  // which channel j comes of 2j and 2j + 1, of the lines above, here and below (null: zeros),
  // [width, 2, channels] as `split_gelu` makes them. slope, may be null, is the derivative at v, dense.
  // weight: [9, 2, channels] by tap. scratch: [channels].
  void (*grouped)(const S* const* lines, int64_t width, int64_t channels, int64_t first, int64_t last,
                  const A* weight, const A* bias, A* scratch, int64_t stride, S* out, S* slope);

  // The gradient of what `split_gelu` was made of, a line: grad [width, channels] of the lines around
  // is that of v, weight [9, 2, channels] turned. `together` pixels [2 channels] lie side by side in
  // `out`, the next ones `step` on. scratch: [2, channels].
  void (*spread)(const S* const* grad, int64_t width, int64_t channels, const A* weight,
                 const S* slope, int64_t together, int64_t step, A* scratch, S* out);

  // sums [9, 2, channels] += grad [width, channels] times what lies under each tap of the lines
  // [width, 2, channels], in channels [first, last).
  void (*tap_gradients)(const S* grad, const S* const* lines, int64_t width, int64_t channels,
                        int64_t first, int64_t last, A* sums);
};

// The best table this processor runs.
template <typename S, typename A>
const HeadKernels<S, A>& head_kernels() {
  return best_table<HeadKernels<S, A>, S>();
}

}  // namespace spectralx::cpu
