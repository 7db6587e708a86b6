// What the files of backward share: its weights and sums, and what a chunk keeps between phases.
#pragma once

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
  Tensor folded;                  // of Op, gamma * down [r, d]
  Tensor column_sums, shift;      // [r]: of folded; down beta
  Tensor mean, offset, slope;     // [A, T]: x's gradient is product - offset - (x - mean) slope
  Tensor z0_grad;                 // of Op, rstd1 * gradient of z0 [T, A, r]
  // In blocks of 64 columns, [o / 64][r][64]: rows a power of two apart would share cache sets.
  Tensor up_products;             // [A, blocks of o, r, 64], c' dout
  Tensor down_products;           // [blocks of d, r, 64], dz0' (norm1's output before weight, bias), of
                                  // more than one chunk
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
    folded = at::empty_like(l.down);
    column_sums = l.wide_empty({l.rank});
    shift = l.wide_empty({l.rank});
    fold();
    offset = l.wide_empty({l.attributes, l.tokens});
    slope = at::empty_like(offset);
    z0_grad = l.op_empty({l.tokens, l.attributes, l.rank});
    up_products = l.wide_empty({l.attributes, blocks_of(l.out, kBlock), l.rank, kBlock});
    if (l.tokens == 0) up_products.zero_();  // else the first chunk puts them down
    if (l.tokens > kChunk) down_products = l.wide_empty({blocks_of(l.d, kBlock), l.rank, kBlock});
    fc1_t_grad = l.wide_zeros(fc1_t.sizes());
    fc2_grad = l.wide_zeros({l.experts, l.rank, l.hidden});
    router_products = l.wide_zeros({l.attributes, l.scores, l.rank});
    router_sums = l.wide_zeros({l.attributes, l.scores});
    sums = l.wide_zeros({sum_size});
  }

  // gamma into down, scaler into up, and the transposes.
  void fold() {
    const auto& l = *this;
    const int64_t up_blocks = blocks_of(l.out, kPanel), fc1_blocks = blocks_of(l.hidden, kPanel),
                  fc2_blocks = blocks_of(l.rank, kPanel);
    const int64_t up_tasks = l.rank, fc1_tasks = up_tasks + up_blocks,
                  fc2_tasks = fc1_tasks + l.experts * fc1_blocks;
    over(fc2_tasks + l.experts * fc2_blocks, [&](int64_t begin, int64_t end) {
      const int64_t longest = std::max(l.rank, l.hidden);
      const Tensor operand = l.op_empty({longest, kPanel}), panel = l.wide_empty({longest, kPanel}),
                   scaled = l.wide_empty({l.rank, kPanel});
      // `count` rows, kPanel at most, of `width` values to a panel, and a panel to columns.
      const auto read = [&](const Op* rows, int64_t count, int64_t width) {
        l.k.pack(rows, count, width, width, data<Op>(operand));
        l.k.widen(data<Op>(operand), width, data<W>(panel));
      };
      const auto write = [&](const Tensor& from, int64_t count, int64_t width, Op* to, int64_t stride) {
        to_columns(l, data<W>(from), count, width, data<Op>(operand), to, stride);
      };
      for (int64_t task = begin; task < end; ++task) {
        if (task < up_tasks) {
          l.k.fold(data<Op>(l.down) + task * l.d, l.d, l.norm1_weight, l.norm1_bias,
                   data<Op>(folded) + task * l.d, data<W>(column_sums) + task,
                   data<W>(shift) + task);
        } else if (task < fc1_tasks) {
          const int64_t o = (task - up_tasks) * kPanel, count = std::min(kPanel, l.out - o);
          read(data<Op>(l.up) + o * l.rank, count, l.rank);
          for (int64_t a = 0; a < l.attributes; ++a) {
            W weight[kPanel] = {};
            std::copy_n(l.scaler + a * l.out + o, count, weight);
            l.k.scale_tokens(data<W>(panel), l.rank, weight, data<W>(scaled));
            write(scaled, count, l.rank, data<Op>(up_t) + a * l.rank * l.out + o, l.out);
          }
        } else if (task < fc2_tasks) {
          const int64_t e = (task - fc1_tasks) / fc1_blocks;
          const int64_t j = (task - fc1_tasks) % fc1_blocks * kPanel;
          const int64_t count = std::min(kPanel, l.hidden - j);
          read(data<Op>(l.fc1) + (e * l.hidden + j) * l.rank, count, l.rank);
          if (l.grouped) {
            write(panel, count, l.rank, data<Op>(fc1_t) + e * l.rank * l.hidden + j, l.hidden);
          } else {
            write(panel, count, l.rank, data<Op>(fc1_t) + e * l.hidden + j, all_hidden);
          }
        } else {
          const int64_t e = (task - fc2_tasks) / fc2_blocks;
          const int64_t i = (task - fc2_tasks) % fc2_blocks * kPanel;
          const int64_t count = std::min(kPanel, l.rank - i);
          read(data<Op>(l.fc2) + (e * l.rank + i) * l.hidden, count, l.hidden);
          write(panel, count, l.hidden, data<Op>(fc2_t) + e * l.hidden * l.rank + i, l.rank);
        }
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
  Tensor normed, dz;              // panels [panels][r][32]
  Tensor c_features;              // [A][r][padded]
  Tensor z0_grad_features;        // [A][r][padded]
  // Of the dense path only.
  Tensor z_features;              // [A][r][padded]
  Tensor y_grad_features;         // [A][E][r][padded]
  Tensor h_tokens, h_grad_tokens;  // by tokens [A][padded][E h]
  Tensor scores_grad;             // wide [A][scores][padded]
  Tensor clean, raw, gates_grad;  // [A, tokens, E]
  Tensor sums;                    // [panels][sum_size], grouped [panels][3 r]

  Trail(const Backward<Op>& l, const Chunk& chunk) : padded(chunk.padded()),
        depth(blocks_of(chunk.tokens, kColumn<Op>) * kColumn<Op>) {
    normed = l.wide_empty({chunk.panels, l.rank, kPanel});
    dz = at::empty_like(normed);
    c_features = l.op_empty({l.attributes, l.rank, padded});
    z0_grad_features = at::empty_like(c_features);
    if (!l.grouped) {
      z_features = at::empty_like(c_features);
      y_grad_features = l.op_empty({l.attributes, l.experts, l.rank, padded});
      h_tokens = l.op_empty({l.attributes, padded, l.all_hidden});
      h_grad_tokens = at::empty_like(h_tokens);
    }
    scores_grad = l.wide_empty({l.attributes, l.scores, padded});
    clean = l.wide_empty({l.attributes, chunk.tokens, l.experts});
    if (l.noise.has_value()) raw = at::empty_like(clean);
    gates_grad = at::empty_like(clean);
    sums = l.wide_zeros({chunk.panels, l.grouped ? 3 * l.rank : l.sum_size});
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

// Of panel q: keeps the mixture c [r][32] and gives its gradient dc; `dout` [o][32] is scratch.
template <typename Op>
void to_mixture(const Backward<Op>& l, const Chunk& chunk, const Incoming& in,
                const Trail<Op>& trail, int64_t q, const Wide<Op>* c, Op* dout, Wide<Op>* dc) {
  const int64_t a = chunk.attribute(q), start = chunk.start(q), outs = l.attributes * l.out;
  l.k.to_features(c, l.rank,
                  data<Op>(trail.c_features) + a * l.rank * trail.padded + start, trail.padded);
  l.k.pack(data<Op>(in.out) + (chunk.first + start) * outs + a * l.out, chunk.count(q), outs, l.out,
           dout);
  product(l.rank, kPanel, l.out, data<Op>(l.up_t) + a * l.rank * l.out, l.out, dout, kPanel, dc,
          kPanel, false);
}

}  // namespace spectralx::cpu
