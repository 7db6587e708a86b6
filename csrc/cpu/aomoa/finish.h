// From products over all tokens to gradients of weights, as the operator returns them.
#pragma once

#include "cpu/aomoa/backward.h"

namespace spectralx::cpu {

// Of a block of 64 columns from o on: the products [A][r][64] of c with them to the gradients of up and
// scaler.
template <typename Op>
void finish_up(const Backward<Op>& l, const Wide<Op>* products, int64_t o, const Gradients& grads) {
  using W = Wide<Op>;
  const Tensor up = l.op_empty({l.rank, kPanel}), sum = l.wide_empty({l.rank, kPanel});
  const int64_t end = std::min(o + kBlock, l.out);
  for (; o < end; o += kPanel) {
    const int64_t count = std::min(kPanel, end - o);
    l.k.pack(data<Op>(l.up) + o * l.rank, count, l.rank, l.rank, data<Op>(up));
    for (int64_t a = 0; a < l.attributes; ++a)
      l.k.add_columns(products + a * l.rank * kBlock + o % kBlock, l.rank, count,
                      l.scaler + a * l.out + o, data<Op>(up), a > 0, data<W>(sum),
                      data<W>(grads.scaler) + a * l.out + o);
    l.k.unpack(data<W>(sum), count, l.rank, nullptr, data<Op>(grads.up) + o * l.rank, l.rank);
  }
}

// Sums as the gradient of `of`: in Op where that is its type.
template <typename Op>
Tensor as_gradient(const Backward<Op>& l, const Wide<Op>* sums, const Tensor& of) {
  using W = Wide<Op>;
  const int64_t count = of.numel(), whole = count / kPanel * kPanel;
  if (of.scalar_type() != Layer<Op>::kOp) {
    const Tensor found = l.wide_empty(of.sizes());
    std::copy_n(sums, count, data<W>(found));
    return found;
  }
  const Tensor found = l.op_empty(of.sizes());
  l.k.to_features(sums, whole / kPanel, data<Op>(found), kPanel);
  W last[kPanel] = {};
  Op rounded[kPanel];
  std::copy(sums + whole, sums + count, last);
  l.k.to_features(last, 1, rounded, kPanel);
  std::copy_n(rounded, count - whole, data<Op>(found) + whole);
  return found;
}

// From the products over all tokens to the gradients of the router, [A, r, E].
template <typename Op>
void to_router(const Backward<Op>& l, const Gradients& grads) {
  using W = Wide<Op>;
  for (int64_t row = 0; row < l.attributes * l.scores; ++row) {
    const int64_t a = row / l.scores, e = row % l.scores;
    const W* products = data<W>(l.router_products) + row * l.rank;
    const W sum = data<W>(l.router_sums)[row];
    W* to = data<W>(e < l.experts ? grads.gate : grads.gate_noise) + a * l.rank * l.experts + e % l.experts;
    for (int64_t i = 0; i < l.rank; ++i, to += l.experts)
      *to = l.norm2_weight[i] * products[i] + l.norm2_bias[i] * sum;
  }
}

// Gradients of the experts' first layers as the operator returns them, [E, h, r].
template <typename Op>
void to_hidden(const Backward<Op>& l, const Gradients& grads) {
  using W = Wide<Op>;
  const int64_t blocks = blocks_of(l.rank, kPanel), stride = l.grouped ? l.hidden : l.all_hidden;
  over(l.experts * blocks, [&](int64_t begin, int64_t end) {
    const Tensor hidden = l.wide_empty({l.hidden, kPanel}), turned = l.op_empty({l.hidden, kPanel});
    for (int64_t task = begin; task < end; ++task) {
      const int64_t e = task / blocks, i = task % blocks * kPanel, count = std::min(kPanel, l.rank - i);
      const W* from = data<W>(l.fc1_t_grad) + i * stride + e * l.hidden * (l.grouped ? l.rank : 1);
      l.k.transpose(from, count, stride, l.hidden, data<W>(hidden));
      to_columns(l, data<W>(hidden), count, l.hidden, data<Op>(turned),
                 data<Op>(grads.fc1_weight) + e * l.hidden * l.rank + i, l.rank);
    }
  });
}

}  // namespace spectralx::cpu
