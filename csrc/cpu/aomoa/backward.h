// What the files of backward share: its weights and sums, and what a chunk keeps between phases.
#pragma once

#include <functional>

#include "cpu/aomoa/layer.h"

namespace spectralx::cpu {

// The first `count` lanes of a panel [features][32] to rows [features][stride] of operands; `operand`
// [features][32] is scratch.
template <typename Op>
void to_columns(const Layer<Op>& l, const Wide<Op>* panel, int64_t count, int64_t features, Op* operand,
                Op* to, int64_t stride) {
  if (count == kPanel) return l.k.to_features(panel, features, to, stride);
  l.k.to_features(panel, features, operand, kPanel);
  for (int64_t i = 0; i < features; ++i) std::copy_n(operand + i * kPanel, count, to + i * stride);
}

// Weights as backward's products take them, and the sums over all chunks. Wide unless said.
template <typename Op>
struct Backward : Layer<Op> {
  using W = Wide<Op>;
  Tensor fc1_t;                   // of Op: [r, E h], grouped [E, r, h]
  Tensor fc2_t, up_t;             // of Op: [E, h, r], scaler * up [A, r, o]
  Tensor router_t;                // [A, r, scores]
  Tensor column_sums, shift;      // [r]: of gamma * down as Op holds it; down beta
  Tensor mean, offset, slope;     // [A, T]: x's gradient is product - offset - (x - mean) slope
  Tensor z0_grad;                 // of Op, rstd1 * gradient of z0 [T, A, r]
  // Of more than one chunk, in blocks of 64 columns: rows a power of two apart would share cache sets.
  Tensor up_products;             // [blocks of o, A, r, 64], c' dout
  Tensor down_products;           // [blocks of d, r, 64], dz0' (norm1's output before weight, bias)
  Tensor fc1_t_grad, fc2_grad;    // as fc1_t; [E, r, h]
  Tensor router_products;         // [A, scores, r]: gradient of the scores' norm2 (before weight, bias)
  Tensor router_sums;             // [A, scores]: of the scores' gradients
  Tensor sums;                    // [E h + E r + 3 r]: fc1_bias, fc2_bias, norm2's two, dz0's sum
  Tensor noise_grad;              // [A, T, E]
  int64_t all_hidden, sum_size;

  Backward(const Arguments& p, bool frozen) : Layer<Op>(p, frozen) {
    const auto& l = *this;
    all_hidden = l.experts * l.hidden;
    sum_size = all_hidden + l.experts * l.rank + 3 * l.rank;
    fc1_t = l.grouped ? l.op_empty({l.experts, l.rank, l.hidden}) : l.op_empty({l.rank, all_hidden});
    fc2_t = l.op_empty({l.experts, l.hidden, l.rank});
    router_t = l.wide_empty({l.attributes, l.rank, l.scores});
    up_t = l.op_empty({l.attributes, l.rank, l.out});
    column_sums = l.wide_empty({l.rank});
    shift = l.wide_empty({l.rank});
    fold();
    offset = l.wide_empty({l.attributes, l.tokens});
    slope = at::empty_like(offset);
    z0_grad = l.op_empty({l.tokens, l.attributes, l.rank});
    if (l.tokens > kChunk) {  // the first puts them down
      up_products = l.wide_empty({blocks_of(l.out, kBlock), l.attributes, l.rank, kBlock});
      down_products = l.wide_empty({blocks_of(l.d, kBlock), l.rank, kBlock});
    }
    fc1_t_grad = l.wide_empty(fc1_t.sizes());
    fc2_grad = l.wide_empty({l.experts, l.rank, l.hidden});
    router_products = l.wide_zeros({l.attributes, l.scores, l.rank});
    router_sums = l.wide_zeros({l.attributes, l.scores});
    sums = l.wide_zeros({sum_size});
  }

  // The sums, scaler into up, and the transposes. Tasks of one loop cost the same.
  void fold() {
    const auto& l = *this;
    over(l.rank, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        l.k.fold(data<Op>(l.down) + row * l.d, l.d, l.norm1_weight, l.norm1_bias,
                 data<W>(column_sums) + row, data<W>(shift) + row);
    });
    // `count` rows, kPanel at most, of `width` values to a panel; `operand` is scratch.
    const auto read = [&](const Op* rows, int64_t count, int64_t width, Op* operand, W* panel) {
      l.k.pack(rows, count, width, width, operand);
      l.k.widen(operand, width, panel);
    };
    over(blocks_of(l.out, kPanel), [&](int64_t begin, int64_t end) {
      const Tensor operand = l.op_empty({l.rank, kPanel}), panel = l.wide_empty({l.rank, kPanel}),
                   scaled = l.wide_empty({l.rank, kPanel});
      for (int64_t o = begin * kPanel; o < std::min(end * kPanel, l.out); o += kPanel) {
        const int64_t count = std::min(kPanel, l.out - o);
        read(data<Op>(l.up) + o * l.rank, count, l.rank, data<Op>(operand), data<W>(panel));
        for (int64_t a = 0; a < l.attributes; ++a) {
          W weight[kPanel] = {};
          std::copy_n(l.scaler + a * l.out + o, count, weight);
          l.k.scale_tokens(data<W>(panel), l.rank, weight, data<W>(scaled));
          to_columns(l, data<W>(scaled), count, l.rank, data<Op>(operand),
                     data<Op>(up_t) + a * l.rank * l.out + o, l.out);
        }
      }
    });
    const int64_t fc1_blocks = blocks_of(l.hidden, kPanel), fc2_blocks = blocks_of(l.rank, kPanel);
    over(l.experts * (fc1_blocks + fc2_blocks), [&](int64_t begin, int64_t end) {
      const int64_t longest = std::max(l.rank, l.hidden);
      const Tensor operand = l.op_empty({longest, kPanel}), panel = l.wide_empty({longest, kPanel});
      for (int64_t task = begin; task < end; ++task) {
        const int64_t e = task / (fc1_blocks + fc2_blocks), block = task % (fc1_blocks + fc2_blocks);
        const bool first = block < fc1_blocks;
        const int64_t i = (first ? block : block - fc1_blocks) * kPanel;
        const int64_t height = first ? l.hidden : l.rank, width = first ? l.rank : l.hidden;
        const int64_t count = std::min(kPanel, height - i);
        const Op* rows = data<Op>(first ? l.fc1 : l.fc2) + (e * height + i) * width;
        const bool side_by_side = first && !l.grouped;  // the experts' columns
        Op* to = side_by_side ? data<Op>(fc1_t) + e * l.hidden + i
                              : data<Op>(first ? fc1_t : fc2_t) + e * width * height + i;
        read(rows, count, width, data<Op>(operand), data<W>(panel));
        to_columns(l, data<W>(panel), count, width, data<Op>(operand), to,
                   side_by_side ? all_hidden : height);
      }
    });
    for (int64_t a = 0; a < l.attributes; ++a) {
      const W* rows = l.router + a * l.scores * l.rank;
      W* to = data<W>(router_t) + a * l.rank * l.scores;
      for (int64_t i = 0; i < l.rank; ++i)
        for (int64_t s = 0; s < l.scores; ++s) *to++ = rows[s * l.rank + i];
    }
  }
};

// What one chunk keeps between its phases. "By features" is [features][padded tokens] of Op, the left
// operand of a product over tokens; "by tokens" its right one.
template <typename Op>
struct Trail {
  using W = Wide<Op>;
  int64_t padded, depth;          // tokens as stored; as many as a product over them takes
  Tensor normed;                  // panels [panels][r][32]
  Tensor c_features;              // [A][r][padded]
  Tensor z0_grad_features;        // [A][r][padded]
  // Of the grouped path only: z's gradient of panel q, [r][32], which its slots hold.
  std::function<void(int64_t q, W* dz)> gather_dz;
  // Of the dense path only.
  Tensor dz;                      // z's gradient, panels [panels][r][32]
  Tensor z_features;              // [A][r][padded]
  Tensor y_grad_features;         // [A][E][r][padded]
  Tensor h_tokens, h_grad_tokens;  // by tokens [A][padded][E h]
  Tensor scores_grad;             // wide [A][scores][padded]
  Tensor clean, raw, gates_grad;  // [A, tokens, E]
  Tensor sums;                    // [panels][sum_size], grouped [panels][3 r]; zeroed by each panel's task

  Trail(const Backward<Op>& l, const Chunk& chunk) : padded(chunk.padded()),
        depth(padded_depth<Op>(chunk.tokens)) {
    normed = l.wide_empty({chunk.panels, l.rank, kPanel});
    c_features = l.op_empty({l.attributes, l.rank, padded});
    z0_grad_features = at::empty_like(c_features);
    if (!l.grouped) {
      dz = at::empty_like(normed);
      z_features = at::empty_like(c_features);
      y_grad_features = l.op_empty({l.attributes, l.experts, l.rank, padded});
      h_tokens = l.op_empty({l.attributes, padded, l.all_hidden});
      h_grad_tokens = at::empty_like(h_tokens);
    }
    scores_grad = l.wide_empty({l.attributes, l.scores, padded});
    clean = l.wide_empty({l.attributes, chunk.tokens, l.experts});
    if (l.noise.has_value()) raw = at::empty_like(clean);
    gates_grad = at::empty_like(clean);
    sums = l.wide_empty({chunk.panels, l.grouped ? 3 * l.rank : l.sum_size});
  }

  // Of panel q: norm2's two and dz0's sum, [3 r].
  W* norm_sums(const Backward<Op>& l, int64_t q) const {
    return data<W>(sums) + (q + 1) * sums.size(1) - 3 * l.rank;
  }
};

// Of panel q: norm2's output and z [r][32] again, and the router's scores; `scores` [scores][32] is
// scratch.
template <typename Op>
void restore(const Backward<Op>& l, const Chunk& chunk, const Incoming& in, const Trail<Op>& trail,
             int64_t q, Wide<Op>* z, Wide<Op>* scores) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t a = chunk.attribute(q), start = chunk.start(q), n = chunk.count(q);
  const int64_t t = chunk.first + start, at = (a * chunk.tokens + start) * l.experts;
  W* normed = data<W>(trail.normed) + q * l.rank * kPanel;
  k.transpose(data<W>(in.normed) + (t * l.attributes + a) * l.rank, n, l.attributes * l.rank,
              l.rank, normed);
  k.affine(normed, l.rank, l.norm2_weight, l.norm2_bias, z);
  product(l.scores, kPanel, l.rank, l.router + a * l.scores * l.rank, l.rank, z, kPanel,
          scores, kPanel, false);
  k.unpack_wide(scores, n, l.experts, data<W>(trail.clean) + at, l.experts);
  if (trail.raw.defined())
    k.unpack_wide(scores + l.experts * kPanel, n, l.experts, data<W>(trail.raw) + at, l.experts);
}

// Of panel q: the gradient dc [r][32] of the mixture; `dout` [o][32] is scratch.
template <typename Op>
void to_mixture(const Backward<Op>& l, const Chunk& chunk, const Incoming& in, int64_t q, Op* dout,
                Wide<Op>* dc) {
  const int64_t a = chunk.attribute(q), start = chunk.start(q), outs = l.attributes * l.out;
  l.k.pack(data<Op>(in.out) + (chunk.first + start) * outs + a * l.out, chunk.count(q), outs, l.out,
           dout);
  product(l.rank, kPanel, l.out, data<Op>(l.up_t) + a * l.rank * l.out, l.out, dout, kPanel, dc,
          kPanel, false);
}

}  // namespace spectralx::cpu
