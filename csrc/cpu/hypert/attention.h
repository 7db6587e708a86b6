// Attention of 32 queries at a time on the CPU, in panels [features][32] as in cpu/aomoa/panels.h:
// keys run down the rows, so sums over keys run in all lanes at once and no score is transposed.
//
//     scores  [keys][32] = K [keys][d] Q^T [d][32]        out^T [e][32] = V^T [e][keys] P [keys][32]
//
// Op is the type of the operands of products: float, double or, where the processor multiplies it,
// bfloat16. Widths and numbers of keys are filled up with zeros to `padded_depth`. The last key may stand
// for several equal ones: padding.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/aomoa/panels.h"
#include "cpu/common/product.h"
#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

// What lies between the products, compiled once for each instruction set (attention_*.cpp).
template <typename Op>
struct AttentionKernels {
  using W = Wide<Op>;
  const char* instruction_set;

  // scores [keys][32] become probabilities: as an operand panel of `padded_depth(keys)` rows, of which the
  // sum over keys is `sums` [32]. `scale` is of the scores; the last key counts `copies` times.
  void (*softmax)(W* scores, int64_t keys, W scale, W copies, Op* operand, W* sums);
  // Of scores and dp [keys][32], the gradient of the probabilities: probabilities p and the
  // gradient ds of the products before scaling, as rows of operands [keys][32], and ds as an operand
  // panel of `padded_depth(keys)` rows. Lanes from n on are zeros.
  void (*softmax_backward)(W* scores, W* dp, int64_t keys, int64_t n, W scale, W copies, Op* p,
                           Op* ds, Op* ds_operand);
  // to[c * to_row + r] = from[r * row + c].
  void (*transpose)(const Op* from, int64_t rows, int64_t columns, int64_t row, int64_t to_row,
                    Op* to);
  // rows [32][columns] to a right operand whose k runs over the rows.
  void (*pair_rows)(const Op* rows, int64_t columns, Op* operand);
  // values as Op holds them.
  void (*store)(const W* values, int64_t count, Op* to);
};

template <typename Op>
const AttentionKernels<Op>& attention_kernels() {
  return best_product_table<AttentionKernels<Op>, Op>();
}

// Keys and values of one head: [keys][width], widths padded, and their transposes
// [width][padded_depth(keys)]. `shared`: the values are the keys.
template <typename Op>
struct Keys {
  int64_t count, width, value_width;
  const Op *k, *k_t, *v, *v_t;
};

// Buffers of one thread.
template <typename Op>
struct Tile {
  using W = Wide<Op>;
  const AttentionKernels<Op>& kernels = attention_kernels<Op>();
  const PanelKernels<Op>& panels = panel_kernels<Op>();
  int64_t keys, width, value_width;
  std::vector<W> scores, dp, out, sums;
  std::vector<Op> q, q_panel, p, ds, ds_rows, dout, dout_panel, right;

  // Widths padded.
  Tile(int64_t keys_, int64_t width_, int64_t value_width_, bool backward)
      : keys(keys_), width(width_), value_width(value_width_), scores(keys * kPanel),
        out(std::max(width, value_width) * kPanel), sums(kPanel), q(kPanel * width),
        q_panel(kPanel * width), p(padded_depth<Op>(keys) * kPanel) {
    if (!backward) return;
    dp.resize(keys * kPanel);
    ds.resize(padded_depth<Op>(keys) * kPanel);
    ds_rows.resize(keys * kPanel);
    dout.resize(kPanel * value_width);
    dout_panel.resize(kPanel * value_width);
    right.resize(kPanel * std::max(width, value_width));
  }

  // q holds n rows [width]: dout's place holds what they find, rows [value_width].
  void forward(const Keys<Op>& keys_of, int64_t n, W scale, W copies, Op* found) {
    score(keys_of, n);
    kernels.softmax(scores.data(), keys, scale, copies, p.data(), sums.data());
    const int64_t depth = padded_depth<Op>(keys);
    product(value_width, kPanel, depth, keys_of.v_t, depth, p.data(), kPanel, out.data(), kPanel, false);
    for (int64_t lane = 0; lane < kPanel; ++lane) sums[lane] = W(1) / sums[lane];
    panels.scale_tokens(out.data(), value_width, sums.data(), out.data());
    panels.unpack(out.data(), n, value_width, nullptr, found, value_width);
  }

  // q and dout hold n rows. Adds to the gradients of keys [keys][width] and values, which may be one;
  // q's gradient goes to dq, rows [width].
  void backward(const Keys<Op>& keys_of, int64_t n, W scale, W copies, W* dk, W* dv, W* dq) {
    score(keys_of, n);
    std::fill(dout.begin() + n * value_width, dout.end(), Op(0));
    panels.pack(dout.data(), n, value_width, value_width, dout_panel.data());
    product(keys, kPanel, value_width, keys_of.v, value_width, dout_panel.data(), kPanel, dp.data(),
            kPanel, false);
    kernels.softmax_backward(scores.data(), dp.data(), keys, n, scale, copies, p.data(),
                             ds_rows.data(), ds.data());
    kernels.pair_rows(dout.data(), value_width, right.data());
    product(keys, value_width, kPanel, p.data(), kPanel, right.data(), value_width, dv, value_width,
            true);
    if (dk != nullptr) {
      kernels.pair_rows(q.data(), width, right.data());
      product(keys, width, kPanel, ds_rows.data(), kPanel, right.data(), width, dk, width, true);
    }
    if (dq == nullptr) return;
    const int64_t depth = padded_depth<Op>(keys);
    product(width, kPanel, depth, keys_of.k_t, depth, ds.data(), kPanel, out.data(), kPanel, false);
    panels.unpack_wide(out.data(), n, width, dq, width);
  }

 private:
  void score(const Keys<Op>& keys_of, int64_t n) {
    std::fill(q.begin() + n * width, q.end(), Op(0));
    panels.pack(q.data(), n, width, width, q_panel.data());
    product(keys, kPanel, width, keys_of.k, width, q_panel.data(), kPanel, scores.data(), kPanel,
            false);
  }
};

}  // namespace spectralx::cpu
