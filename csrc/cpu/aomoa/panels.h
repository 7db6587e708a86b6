// What lies between the products of AoMoA on the CPU, on panels.
//
// A panel holds 32 tokens of one attribute side by side: [features][32]. Products of a chain then
// need no transposition (the output of one is the right operand of the next), and every sum over
// features runs in all lanes at once. Tokens that a last panel lacks are zeros.
//
// W is the type sums are formed in. Op is that of the operands of products, stored as a product
// takes them (common/product.h): "operand panels" are [features][32], for bfloat16
// [features / 2][32][2]. All functions work on the calling thread. They are compiled once for each
// instruction set (panels_*.cpp) and chosen at run time.
#pragma once

#include <cstdint>

#include "cpu/common/product.h"
#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

// Columns of a right operand that is packed for one task.
constexpr int64_t kBlock = 64;

// log(2.220446049250313e-16): a token that no expert takes.
constexpr double kLogEpsilon = -36.04365338911715;

template <typename Op>
struct PanelKernels {
  using W = Wide<Op>;
  const char* instruction_set;

  // rows [n][stride] of `features` each, n <= 32, to an operand panel.
  void (*pack)(const Op* rows, int64_t n, int64_t stride, int64_t features, Op* panel);
  // The same from and to W, not an operand.
  void (*transpose)(const W* rows, int64_t n, int64_t stride, int64_t features, W* panel);
  // Back: a panel to rows [n][stride] of the storage type, plus bias [features] unless null.
  void (*unpack)(const W* panel, int64_t n, int64_t features, const W* bias, Op* rows,
                 int64_t stride);
  void (*unpack_wide)(const W* panel, int64_t n, int64_t features, W* rows, int64_t stride);
  // `count` values as Op holds them.
  void (*round)(const W* values, int64_t count, Op* to);
  // An operand panel to W.
  void (*widen)(const Op* operand, int64_t features, W* panel);
  // A panel to an operand panel, and to features [features][stride] of operands.
  void (*to_operand)(const W* panel, int64_t features, Op* operand);
  void (*to_features)(const W* panel, int64_t features, Op* rows, int64_t stride);
  // The latter of an operand panel.
  void (*spread)(const Op* operand, int64_t features, Op* rows, int64_t stride);
  // A panel to a right operand whose k runs over tokens: 32 tokens of [tokens][width], from its
  // first column on; for bfloat16 [tokens / 2][width][2].
  void (*to_tokens)(const W* panel, int64_t features, Op* operand, int64_t width);

  // Layer norm over the features: mean and rstd [32] of an operand panel, then
  // out = (x - mean) * rstd * weight + bias.
  void (*moments)(const Op* panel, int64_t features, W eps, W* mean, W* rstd);
  void (*normalise)(const Op* panel, int64_t features, const W* mean, const W* rstd,
                    const W* weight, const W* bias, Op* out);
  // x becomes (x - mean) * rstd.
  void (*norm)(W* x, int64_t features, W eps, W* rstd);
  // z = normed * weight + bias as Op holds it.
  void (*affine)(const W* normed, int64_t features, const W* weight, const W* bias, W* z);
  // dz becomes the gradient of norm's input; adds to dweight and dbias [features].
  void (*norm_backward)(W* dz, const W* normed, int64_t features, const W* rstd, const W* weight,
                        W* dweight, W* dbias);

  // h = max(h + bias, 0), NaN kept, and as an operand panel.
  void (*bias_relu)(W* h, int64_t features, const W* bias, Op* operand);
  // dh becomes 0 where h is; its sums over the tokens are added to dbias.
  void (*relu_backward)(W* dh, const W* h, int64_t features, W* dbias);

  // Columns of panels [..][features][32] side by side: columns[n] = 32 * panel + lane, or -1 for
  // zeros. Of operands; of W, put down or added.
  void (*gather_operand)(const Op* panels, const int64_t* columns, int64_t features, Op* operand);
  void (*gather)(const W* panels, const int64_t* columns, int64_t features, bool add, W* panel);

  // c [r][32] = log of the sum over e of gates [E][32] times exp(y [E][r][32] + bias [E][r]), where
  // a token has at most `top_k` gates. y becomes y + bias. The bias may be null.
  void (*combine)(W* y, int64_t experts, int64_t top_k, int64_t r, const W* bias, const W* gates,
                  W* c);
  // y (with its bias) becomes its own gradient; dgates [E][32]; the sums over the tokens of y's
  // gradient are added to dbias [E][r].
  void (*combine_backward)(W* y, int64_t experts, int64_t r, const W* gates, const W* c,
                           const W* dc, W* dgates, W* dbias);
  // Of 32 tokens whose terms are columns [k][32] of panels y [..][r][32] side by side: the mixture c as an
  // operand panel. `terms` [k][64][32] is scratch.
  void (*mix)(const W* y, const int64_t* columns, int64_t top_k, int64_t r, const W* gates, W* terms,
              Op* c);
  // From c's gradient dc [r][32] too: c to rows [r][stride], each term's gradient to operand panels
  // dy [k][r][32], those of the gates to dgates [k][32].
  void (*unmix)(const W* y, const int64_t* columns, int64_t top_k, int64_t r, const W* gates,
                const W* dc, W* terms, Op* c, int64_t stride, Op* dy, W* dgates);

  // A right operand [tokens, rounded up to 32][64] whose k runs over tokens: `columns` (<= 64)
  // columns of rows [tokens][stride], as (x - mean) * rstd unless mean is null, then zeros.
  void (*pack_tokens)(const Op* rows, int64_t tokens, int64_t stride, int64_t columns,
                      const W* mean, const W* rstd, Op* operand);
  // The same of rows of W as they are.
  void (*pack_wide)(const W* rows, int64_t tokens, int64_t stride, int64_t columns, Op* operand);
  // The same, each column times its weight.
  void (*pack_scaled)(const Op* rows, int64_t tokens, int64_t stride, int64_t columns,
                      const W* weight, Op* operand);
  // sums [features] += the sum of each feature over the tokens, of a panel and of an operand panel.
  void (*add_sums)(const W* panel, int64_t features, W* sums);
  void (*add_operand_sums)(const Op* operand, int64_t features, W* sums);
  // Each feature times its weight; each token times its own.
  void (*scale_features)(W* panel, int64_t features, const W* weight);
  void (*scale_tokens)(const W* panel, int64_t features, const W* weight, W* out);
  // sums [32] = the sum over the features of panel times weight [features], or times other.
  void (*dot_weight)(const W* panel, int64_t features, const W* weight, W* sums);
  void (*dot_panel)(const W* panel, int64_t features, const W* other, W* sums);

  // sum = that of gamma * row as Op holds it; shift = the sum of beta * row.
  void (*fold)(const Op* row, int64_t width, const W* gamma, const W* beta, W* sum, W* shift);
  // Of `columns` columns of down [r][stride], products [r][64] and z0's gradients z0_sums [r]:
  // gradients of down, gamma and beta.
  void (*finish_down)(const Op* down, const W* products, int64_t r, int64_t columns,
                      int64_t stride, const W* gamma, const W* beta, const W* z0_sums,
                      Op* down_grad, W* gamma_grad, W* beta_grad);
  // Of `count` (<= 32) columns of products [r][64]: times weight [count] put down as a panel or added to
  // it; along [count] = their sums over r times the operand panel `up`.
  void (*add_columns)(const W* products, int64_t r, int64_t count, const W* weight, const Op* up,
                      bool add, W* panel, W* along);
  // dx [tokens][stride] = product [tokens][64] - offset - (x - mean) * slope, `columns` of them;
  // mean, offset, slope: one a token. x has the stride of dx.
  void (*finish_input)(const W* product, int64_t tokens, int64_t columns, const Op* x,
                       const W* mean, const W* offset, const W* slope, Op* dx, int64_t stride);
};

// The best table this processor runs.
template <typename Op>
const PanelKernels<Op>& panel_kernels() {
  return best_product_table<PanelKernels<Op>, Op>();
}

}  // namespace spectralx::cpu
