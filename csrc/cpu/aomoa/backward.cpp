// Backward of the layer on the CPU. By panels from the output's gradient to norm2's input, then the
// weights' gradients, whose products run over the tokens of a chunk, then the input's gradient.
//
// The number of threads changes no bit: a product belongs to one thread, sums over the tokens of a
// panel are kept apart and added up in the panels' order, chunks come one after the other.
#include "cpu/torch.h"

#include "cpu/aomoa/backward.h"

#include <numeric>

#include "cpu/aomoa/finish.h"
#include "cpu/aomoa/gating.h"
#include "cpu/aomoa/grouped.h"

namespace spectralx::cpu {

namespace {

// Columns of a task that starts at `from`.
int64_t width(int64_t whole, int64_t from) { return std::min(kBlock, whole - from); }

// Routing and mixture again, then back to z: dz, the gates' gradients, and what the experts'
// weights' gradients need. Every expert on every token.
template <typename Op>
void unmix_densely(const Backward<Op>& l, const Chunk& chunk, const Incoming& in,
                   Trail<Op>& trail) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t all = l.all_hidden, padded = trail.padded;
  const Tensor gates = chunk.of(in.kept_gates).contiguous();
  over(chunk.panels, [&](int64_t begin, int64_t end) {
    const Tensor z = l.wide_empty({l.rank, kPanel}), z_operand = l.op_empty({l.rank, kPanel}),
                 scores = l.wide_empty({l.scores, kPanel}), g = l.wide_empty({l.experts, kPanel}),
                 dg = l.wide_empty({l.experts, kPanel}), h = l.wide_empty({all, kPanel}),
                 h_operand = l.op_empty({all, kPanel}), dh = l.wide_empty({all, kPanel}),
                 y = l.wide_empty({l.experts, l.rank, kPanel}),
                 dy_operand = l.op_empty({l.rank, kPanel}), c = l.wide_empty({l.rank, kPanel}),
                 dc = l.wide_empty({l.rank, kPanel}), dout = l.op_empty({l.out, kPanel});
    for (int64_t q = begin; q < end; ++q) {
      const int64_t a = chunk.attribute(q), start = chunk.start(q), n = chunk.count(q);
      const int64_t at = (a * chunk.tokens + start) * l.experts;
      W* sums = data<W>(trail.sums) + q * l.sum_size;
      std::fill_n(sums, l.sum_size - 3 * l.rank, W(0));
      restore(l, chunk, in, trail, q, data<W>(z), data<W>(scores));
      k.to_operand(data<W>(z), l.rank, data<Op>(z_operand));
      k.to_features(data<W>(z), l.rank, data<Op>(trail.z_features) + a * l.rank * padded + start,
                    padded);

      k.transpose(data<W>(gates) + at, n, l.experts, l.experts, data<W>(g));
      product(all, kPanel, l.rank, data<Op>(l.fc1), l.rank, data<Op>(z_operand), kPanel,
              data<W>(h), kPanel, false);
      k.bias_relu(data<W>(h), all, l.fc1_bias, data<Op>(h_operand));
      k.to_tokens(data<W>(h), all, data<Op>(trail.h_tokens) + (a * padded + start) * all, all);
      for (int64_t e = 0; e < l.experts; ++e)
        product(l.rank, kPanel, l.hidden, data<Op>(l.fc2) + e * l.rank * l.hidden, l.hidden,
                data<Op>(h_operand) + e * l.hidden * kPanel, kPanel,
                data<W>(y) + e * l.rank * kPanel, kPanel, false);
      k.combine(data<W>(y), l.experts, l.top_k, l.rank, l.fc2_bias, data<W>(g), data<W>(c));
      k.to_features(data<W>(c), l.rank, data<Op>(trail.c_features) + a * l.rank * padded + start,
                    padded);
      to_mixture(l, chunk, in, q, data<Op>(dout), data<W>(dc));
      k.combine_backward(data<W>(y), l.experts, l.rank, data<W>(g), data<W>(c), data<W>(dc),
                         data<W>(dg), sums + all);
      k.unpack_wide(data<W>(dg), n, l.experts, data<W>(trail.gates_grad) + at, l.experts);
      for (int64_t e = 0; e < l.experts; ++e) {
        const W* dy = data<W>(y) + e * l.rank * kPanel;
        k.to_features(dy, l.rank,
                      data<Op>(trail.y_grad_features) +
                          (a * l.experts + e) * l.rank * padded + start,
                      padded);
        k.to_operand(dy, l.rank, data<Op>(dy_operand));
        product(l.hidden, kPanel, l.rank, data<Op>(l.fc2_t) + e * l.hidden * l.rank, l.rank,
                data<Op>(dy_operand), kPanel, data<W>(dh) + e * l.hidden * kPanel, kPanel, false);
      }
      k.relu_backward(data<W>(dh), data<W>(h), all, sums);
      k.to_operand(data<W>(dh), all, data<Op>(h_operand));
      k.to_tokens(data<W>(dh), all, data<Op>(trail.h_grad_tokens) + (a * padded + start) * all,
                  all);
      product(l.rank, kPanel, all, data<Op>(l.fc1_t), all, data<Op>(h_operand), kPanel,
              data<W>(trail.dz) + q * l.rank * kPanel, kPanel, false);
    }
  });
}

// Through the router and norm2 to the gradient of z0, and what it makes of x's gradient.
template <typename Op>
void to_z0(const Backward<Op>& l, const Chunk& chunk, const Incoming& in,
           const GatingGradients& routing, Trail<Op>& trail) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t padded = trail.padded, plane = l.attributes * l.tokens;
  const W per_feature = W(1) / static_cast<W>(l.d);
  over(chunk.panels, [&](int64_t begin, int64_t end) {
    const Tensor scores = l.wide_empty({l.scores, kPanel}), scaled = l.wide_empty({l.rank, kPanel}),
                 gathered = l.wide_empty({l.grouped ? l.rank : 0, kPanel});
    W rstd1[kPanel], rstd2[kPanel], along_sums[kPanel], along_normed[kPanel], along_shift[kPanel];
    for (int64_t q = begin; q < end; ++q) {
      const int64_t a = chunk.attribute(q), start = chunk.start(q), n = chunk.count(q);
      const int64_t t = chunk.first + start, at = (a * chunk.tokens + start) * l.experts;
      const W* normed = data<W>(trail.normed) + q * l.rank * kPanel;
      W* dz = l.grouped ? data<W>(gathered) : data<W>(trail.dz) + q * l.rank * kPanel;
      if (l.grouped) trail.gather_dz(q, dz);
      W* sums = trail.norm_sums(l, q);
      std::fill_n(sums, 3 * l.rank, W(0));
      k.transpose(data<W>(routing.clean) + at, n, l.experts, l.experts, data<W>(scores));
      if (trail.raw.defined())
        k.transpose(data<W>(routing.raw_std) + at, n, l.experts, l.experts,
                    data<W>(scores) + l.experts * kPanel);
      for (int64_t i = 0; i < l.scores; ++i)
        std::copy_n(data<W>(scores) + i * kPanel, kPanel,
                    data<W>(trail.scores_grad) + (a * l.scores + i) * padded + start);
      product(l.rank, kPanel, l.scores, data<W>(l.router_t) + a * l.rank * l.scores, l.scores,
              data<W>(scores), kPanel, dz, kPanel, true);

      const W* statistics = data<W>(in.statistics) + a * l.tokens + t;
      for (int64_t i = 0; i < kPanel; ++i) {
        rstd1[i] = i < n ? statistics[plane + i] : W(0);
        rstd2[i] = i < n ? statistics[2 * plane + i] : W(0);
      }
      k.norm_backward(dz, normed, l.rank, rstd2, l.norm2_weight, sums, sums + l.rank);
      k.add_sums(dz, l.rank, sums + 2 * l.rank);
      k.to_features(dz, l.rank,
                    data<Op>(trail.z0_grad_features) + a * l.rank * padded + start, padded);
      if (!in.want_x) continue;
      k.scale_tokens(dz, l.rank, rstd1, data<W>(scaled));
      k.unpack(data<W>(scaled), n, l.rank, nullptr,
               data<Op>(l.z0_grad) + (t * l.attributes + a) * l.rank, l.attributes * l.rank);
      // norm1's input has gradient rstd1 (dn - mean(dn) - n mean(n dn)) with dn = dz0 folded, whose
      // means follow from dz0 alone: n folded' = z0 - shift, and dz0 is orthogonal to 1.
      k.dot_weight(dz, l.rank, data<W>(l.column_sums), along_sums);
      k.dot_panel(dz, l.rank, normed, along_normed);
      k.dot_weight(dz, l.rank, data<W>(l.shift), along_shift);
      for (int64_t i = 0; i < n; ++i) {
        const W mean = along_sums[i] * per_feature;
        const W along = (along_normed[i] / rstd2[i] - along_shift[i]) * per_feature;
        data<W>(l.offset)[a * l.tokens + t + i] = rstd1[i] * mean;
        data<W>(l.slope)[a * l.tokens + t + i] = rstd1[i] * rstd1[i] * along;
      }
    }
  });
}

// Products over the tokens of the chunk, added to the gradients of the experts' weights.
template <typename Op>
void to_experts_densely(const Backward<Op>& l, const Chunk& chunk, const Trail<Op>& trail) {
  using W = Wide<Op>;
  const int64_t padded = trail.padded, depth = trail.depth, all = l.all_hidden;
  const int64_t fc2_blocks = blocks_of(l.hidden, kBlock);
  over(l.experts * fc2_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t e = task / fc2_blocks, j = task % fc2_blocks * kBlock;
      for (int64_t a = 0; a < l.attributes; ++a)
        product(l.rank, width(l.hidden, j), depth,
                data<Op>(trail.y_grad_features) + (a * l.experts + e) * l.rank * padded, padded,
                data<Op>(trail.h_tokens) + a * padded * all + (e * l.hidden + j) * kColumn<Op>, all,
                data<W>(l.fc2_grad) + e * l.rank * l.hidden + j, l.hidden, chunk.first > 0 || a > 0);
    }
  });
  over(blocks_of(all, kBlock), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kBlock; j < std::min(end * kBlock, all); j += kBlock) {
      for (int64_t a = 0; a < l.attributes; ++a)
        product(l.rank, width(all, j), depth, data<Op>(trail.z_features) + a * l.rank * padded,
                padded, data<Op>(trail.h_grad_tokens) + a * padded * all + j * kColumn<Op>, all,
                data<W>(l.fc1_t_grad) + j, all, chunk.first > 0 || a > 0);
    }
  });
}

// Products over the tokens of the chunk, added to the other weights' gradients, of which the last chunk
// finishes those of up, scaler, down and norm1. A task has 64 columns.
template <typename Op>
void to_weights(const Backward<Op>& l, const Chunk& chunk, const Incoming& in,
                const Trail<Op>& trail, const Gradients& grads) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t summed = trail.sums.size(1);
  for (int64_t q = 0; q < chunk.panels; ++q) {
    const W* from = data<W>(trail.sums) + q * summed;
    W* to = data<W>(l.sums) + l.sum_size - summed;
    for (int64_t i = 0; i < summed; ++i) to[i] += from[i];
  }
  const int64_t padded = trail.padded, depth = trail.depth, outs = l.attributes * l.out;
  // Tasks of one loop cost the same, which is how they are dealt out.
  const bool once = l.tokens <= kChunk, last = chunk.first + chunk.tokens == l.tokens;
  over(blocks_of(l.out, kBlock), [&](int64_t begin, int64_t end) {
    const int64_t size = l.rank * kBlock;
    const Tensor right = l.op_empty({padded, kBlock}),
                 all = once ? l.wide_empty({l.attributes, l.rank, kBlock}) : l.up_products;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task * kBlock;
      W* products = data<W>(all) + (once ? 0 : task * l.attributes * size);
      for (int64_t a = 0; a < l.attributes; ++a) {
        const Op* rows = data<Op>(in.out) + chunk.first * outs + a * l.out + o;
        k.pack_tokens(rows, chunk.tokens, outs, width(l.out, o), nullptr, nullptr, data<Op>(right));
        product(l.rank, width(l.out, o), depth, data<Op>(trail.c_features) + a * l.rank * padded,
                padded, data<Op>(right), kBlock, products + a * size, kBlock, chunk.first > 0);
      }
      if (last) finish_up(l, products, o, grads);
    }
  });
  const W* z0_sums = data<W>(l.sums) + l.sum_size - l.rank;
  over(blocks_of(l.d, kBlock), [&](int64_t begin, int64_t end) {
    const Tensor right = l.op_empty({padded, kBlock}),
                 all = once ? l.wide_empty({l.rank, kBlock}) : l.down_products;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task * kBlock;
      W* products = data<W>(all) + (once ? 0 : i * l.rank);
      for (int64_t a = 0; a < l.attributes; ++a) {
        const W* mean = data<W>(in.statistics) + a * l.tokens + chunk.first;
        const Op* rows = data<Op>(l.x) + chunk.first * l.width + a * l.d + i;
        k.pack_tokens(rows, chunk.tokens, l.width, width(l.d, i), mean,
                      mean + l.attributes * l.tokens, data<Op>(right));
        product(l.rank, width(l.d, i), depth,
                data<Op>(trail.z0_grad_features) + a * l.rank * padded, padded, data<Op>(right),
                kBlock, products, kBlock, chunk.first > 0 || a > 0);
      }
      if (last)
        k.finish_down(data<Op>(l.down) + i, products, l.rank, width(l.d, i), l.d,
                      l.norm1_weight + i, l.norm1_bias + i, z0_sums,
                      data<Op>(grads.down) + i, data<W>(grads.norm1_weight) + i,
                      data<W>(grads.norm1_bias) + i);
    }
  });
  // The router's takes z = norm2's output times weight plus bias, which are left to `to_router`.
  const int64_t rank_blocks = blocks_of(l.rank, kBlock);
  over(l.attributes * rank_blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t a = task / rank_blocks, i = task % rank_blocks * kBlock;
      product(l.scores, width(l.rank, i), chunk.tokens,
              data<W>(trail.scores_grad) + a * l.scores * padded, padded,
              data<W>(in.normed) + (chunk.first * l.attributes + a) * l.rank + i,
              l.attributes * l.rank, data<W>(l.router_products) + a * l.scores * l.rank + i, l.rank,
              true);
    }
  });
  for (int64_t row = 0; row < l.attributes * l.scores; ++row) {
    const W* from = data<W>(trail.scores_grad) + row * padded;
    data<W>(l.router_sums)[row] = std::accumulate(from, from + chunk.tokens, data<W>(l.router_sums)[row]);
  }
}

// x's gradient: dout W of the frozen layer and norm1's share in one product a tile. Attributes share the
// packed columns of down, the tiles of a group each part of those of W.
template <typename Op>
void to_input(const Backward<Op>& l, const Incoming& in, const Tensor& x_grad) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t outs = l.attributes * l.out, per_attribute = blocks_of(l.d, kBlock);
  const int64_t depth = l.weight.defined() ? outs : 0;
  const Op *x = data<Op>(l.x), *dout = data<Op>(in.out), *z0_grad = data<Op>(l.z0_grad);
  Op* dx = data<Op>(x_grad);
  over(l.attributes * per_attribute, [&](int64_t begin, int64_t end) {
    const Tensor of_frozen = l.op_empty({blocks_of(depth, kPanel) * kPanel, kBlock}),
                 of_folded = l.op_empty({blocks_of(l.rank, kPanel) * kPanel, kBlock}),
                 all = l.wide_empty({kChunk, kBlock});
    Op *frozen = data<Op>(of_frozen), *folded = data<Op>(of_folded);
    W* tiles = data<W>(all);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t a = task % l.attributes, i = task / l.attributes * kBlock;
      const int64_t columns = width(l.d, i), at = a * l.d + i;
      if (l.wide) {
        k.pack_wide(data<W>(l.weight) + at, outs, l.width, columns, frozen);
      } else if (depth > 0) {
        k.pack_tokens(data<Op>(l.weight) + at, outs, l.width, columns, nullptr, nullptr, frozen);
      }
      if (task == begin || a == 0)
        k.pack_scaled(data<Op>(l.down) + i, l.rank, l.d, columns, l.norm1_weight + i, folded);
      for (int64_t first = 0; first < l.tokens; first += kChunk) {
        const int64_t last = std::min(first + kChunk, l.tokens);
        // use(t, rows, sums) for each tile.
        const auto each = [&](const auto& use) {
          for (int64_t t = first; t < last; t += kRowBlock)
            use(t, std::min(kRowBlock, last - t), tiles + (t - first) * kBlock);
        };
        each([&](int64_t t, int64_t rows, W* sums) {
          product(rows, kBlock, l.rank, z0_grad + (t * l.attributes + a) * l.rank,
                  l.attributes * l.rank, folded, kBlock, sums, kBlock, false);
        });
        int64_t o = 0;
        const auto multiply = [&](int64_t t, int64_t rows, W* sums) {
          product(rows, kBlock, std::min(kDepth<Op>, depth - o), dout + t * outs + o, outs,
                  frozen + o * kBlock, kBlock, sums, kBlock, true);
        };
        for (; o + kDepth<Op> < depth; o += kDepth<Op>) each(multiply);
        each([&](int64_t t, int64_t rows, W* sums) {
          const int64_t row = a * l.tokens + t;
          ask(x + t * l.width + at, rows, l.width, columns);
          ask(dx + t * l.width + at, rows, l.width, columns);
          if (depth > 0) multiply(t, rows, sums);
          k.finish_input(sums, rows, columns, x + t * l.width + at, data<W>(in.statistics) + row,
                         data<W>(l.offset) + row, data<W>(l.slope) + row, dx + t * l.width + at,
                         l.width);
        });
      }
    }
  });
}

}  // namespace

template <typename Op>
Gradients backward(const Arguments& arguments, const Incoming& in, bool frozen) {
  const Backward<Op> l(arguments, frozen);
  Gradients grads;
  grads.up = at::empty_like(l.up);
  grads.scaler = l.wide_empty({l.attributes * l.out});
  grads.down = at::empty_like(l.down);
  grads.fc1_weight = l.op_empty({l.experts, l.hidden, l.rank});
  grads.gate = l.wide_empty({l.attributes, l.rank, l.experts});
  grads.gate_noise = l.noise.has_value() ? at::empty_like(grads.gate) : at::zeros_like(grads.gate);
  grads.norm1_weight = l.wide_empty({l.d});
  grads.norm1_bias = l.wide_empty({l.d});
  if (l.tokens == 0) {  // there is no first or last chunk
    for (const Tensor& grad : {grads.up, grads.scaler, grads.down, grads.norm1_weight, grads.norm1_bias,
                               l.fc1_t_grad, l.fc2_grad})
      grad.zero_();
  }
  if (in.want_noise) grads.noise = l.wide_empty({l.attributes, l.tokens, l.experts});
  for (int64_t first = 0; first < l.tokens; first += kChunk) {
    const Chunk chunk(first, l.tokens, l.attributes);
    Trail<Op> trail(l, chunk);
    if (l.grouped) {
      unmix_grouped(l, chunk, in, trail);
    } else {
      unmix_densely(l, chunk, in, trail);
      to_experts_densely(l, chunk, trail);
    }
    if (in.gates.has_value()) trail.gates_grad.add_(chunk.of(*in.gates));
    const auto raw = trail.raw.defined() ? std::optional<Tensor>(trail.raw) : std::nullopt;
    const GatingGradients routing =
        noisy_topk_gating_gradients(trail.gates_grad, in.load, trail.clean, raw,
                                    chunk.of(l.noise), l.top_k, raw.has_value(), in.want_noise);
    if (in.want_noise) chunk.of(grads.noise).copy_(routing.noise);
    to_z0(l, chunk, in, routing, trail);
    to_weights(l, chunk, in, trail, grads);
  }
  if (in.want_x) {
    grads.x = l.op_empty({l.tokens, l.width});
    to_input(l, in, grads.x);
  }

  to_hidden(l, grads);
  to_router(l, grads);
  grads.fc2_weight = l.fc2_grad;
  const auto* sums = data<Wide<Op>>(l.sums);
  grads.fc1_bias = as_gradient(l, sums, arguments.fc1_bias);
  grads.fc2_bias = as_gradient(l, sums += l.all_hidden, arguments.fc2_bias);
  grads.norm2_weight = as_gradient(l, sums += l.experts * l.rank, arguments.norm2_weight);
  grads.norm2_bias = as_gradient(l, sums + l.rank, arguments.norm2_bias);
  const auto whole = [&](Tensor& grad, const Tensor& of) {
    if (grad.scalar_type() != of.scalar_type()) grad = as_gradient(l, data<Wide<Op>>(grad), of);
  };
  whole(grads.scaler, arguments.scaler);
  whole(grads.norm1_weight, arguments.norm1_weight);
  whole(grads.norm1_bias, arguments.norm1_bias);
  whole(grads.gate, arguments.gate);
  whole(grads.gate_noise, arguments.gate_noise);
  return grads;
}

template Gradients backward<float>(const Arguments&, const Incoming&, bool);
template Gradients backward<double>(const Arguments&, const Incoming&, bool);
template Gradients backward<c10::BFloat16>(const Arguments&, const Incoming&, bool);

}  // namespace spectralx::cpu
