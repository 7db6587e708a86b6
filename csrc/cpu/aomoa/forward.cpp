// Forward of the layer on the CPU: x to z by panels, routing, experts to the mixture c, then output.
#include "cpu/torch.h"

#include "cpu/aomoa/layer.h"

#include "cpu/aomoa/gating.h"
#include "cpu/aomoa/grouped.h"

namespace spectralx::cpu {

namespace {

// What one chunk keeps between its phases.
template <typename Op>
struct Chain {
  using W = Wide<Op>;
  Tensor x, z, c;      // operand panels [blocks][in][32], [panels][r][32], [panels][r][32]
  Tensor clean, raw;   // scores [A, tokens, E]

  Chain(const Layer<Op>& l, const Chunk& chunk)
      : x(l.op_empty({chunk.blocks, l.width, kPanel})),
        z(l.op_empty({chunk.panels, l.rank, kPanel})),
        c(l.op_empty({chunk.panels, l.rank, kPanel})),
        clean(l.wide_empty({l.attributes, chunk.tokens, l.experts})),
        raw(l.noise.has_value() ? at::empty_like(clean) : Tensor()) {}
};

// x to z and the router's scores; keeps norm2's output and the statistics of both norms.
template <typename Op>
void to_scores(const Layer<Op>& l, const Chunk& chunk, Chain<Op>& chain, const Outputs& outputs) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t plane = l.attributes * l.tokens;
  // Panels of a group share each part of `down`.
  const Cut cut = cut_of<Op>();
  const bool parts = cut.panels > 1;
  const int64_t depth = parts ? cut.depth : l.d, rows = parts ? kRowBlock : l.rank;
  over(chunk.panels, [&](int64_t begin, int64_t end) {
    const Tensor all_u = l.op_empty({cut.panels, l.d, kPanel}),
                 all_z0 = l.wide_empty({cut.panels, l.rank, kPanel}),
                 z = l.wide_empty({l.rank, kPanel}), scores = l.wide_empty({l.scores, kPanel});
    W moments[3][kPanel];  // mean and rstd of norm1, rstd of norm2
    const auto keep = [&](int64_t q, int64_t i) {
      const int64_t token = chunk.attribute(q) * l.tokens + chunk.first + chunk.start(q);
      std::copy_n(moments[i], chunk.count(q), data<W>(outputs.statistics) + i * plane + token);
    };
    const auto to_z0 = [&](int64_t first, int64_t last) {
      for (int64_t q = first; q < last; ++q) {
        const int64_t a = chunk.attribute(q), t = chunk.first + chunk.start(q);
        Op* x = data<Op>(chain.x) + (chunk.block(q) * l.width + a * l.d) * kPanel;
        k.pack(data<Op>(l.x) + t * l.width + a * l.d, chunk.count(q), l.width, l.d, x);
        k.moments(x, l.d, l.eps, moments[0], moments[1]);
        k.normalise(x, l.d, moments[0], moments[1], l.norm1_weight, l.norm1_bias,
                    data<Op>(all_u) + (q - first) * l.d * kPanel);
        keep(q, 0);
        keep(q, 1);
      }
      for (int64_t i = 0; i < l.d; i += depth) {
        for (int64_t row = 0; row < l.rank; row += rows) {
          for (int64_t q = first; q < last; ++q)
            product(std::min(rows, l.rank - row), lanes_of(chunk.count(q)), std::min(depth, l.d - i),
                    data<Op>(l.down) + row * l.d + i, l.d,
                    data<Op>(all_u) + ((q - first) * l.d + i) * kPanel, kPanel,
                    data<W>(all_z0) + ((q - first) * l.rank + row) * kPanel, kPanel, i > 0);
        }
      }
    };
    for (int64_t q = begin; q < end; ++q) {
      const int64_t a = chunk.attribute(q), t = chunk.first + chunk.start(q), n = chunk.count(q);
      const int64_t lanes = lanes_of(n), place = (q - begin) % cut.panels;
      if (place == 0) to_z0(q, std::min(q + cut.panels, end));
      W* z0 = data<W>(all_z0) + place * l.rank * kPanel;
      k.norm(z0, l.rank, l.eps, moments[2]);
      keep(q, 2);
      k.unpack_wide(z0, n, l.rank, data<W>(outputs.normed) + (t * l.attributes + a) * l.rank,
                    l.attributes * l.rank);
      k.affine(z0, l.rank, l.norm2_weight, l.norm2_bias, data<W>(z));
      k.to_operand(data<W>(z), l.rank, data<Op>(chain.z) + q * l.rank * kPanel);
      product(l.scores, lanes, l.rank, l.router + a * l.scores * l.rank, l.rank,
              data<W>(z), kPanel, data<W>(scores), kPanel, false);
      const int64_t at = (a * chunk.tokens + chunk.start(q)) * l.experts;
      k.unpack_wide(data<W>(scores), n, l.experts, data<W>(chain.clean) + at, l.experts);
      if (chain.raw.defined())
        k.unpack_wide(data<W>(scores) + l.experts * kPanel, n, l.experts,
                      data<W>(chain.raw) + at, l.experts);
    }
  });
}

// z to c, every expert on every token; gates [A, tokens, E].
template <typename Op>
void mix_densely(const Layer<Op>& l, const Chunk& chunk, Chain<Op>& chain, const Tensor& gates) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t all = l.experts * l.hidden;
  over(chunk.panels, [&](int64_t begin, int64_t end) {
    const Tensor g = l.wide_empty({l.experts, kPanel}), h = l.wide_empty({all, kPanel}),
                 h_operand = l.op_empty({all, kPanel}),
                 y = l.wide_empty({l.experts, l.rank, kPanel}),
                 c = l.wide_empty({l.rank, kPanel});
    for (int64_t q = begin; q < end; ++q) {
      const int64_t at = (chunk.attribute(q) * chunk.tokens + chunk.start(q)) * l.experts;
      const int64_t lanes = lanes_of(chunk.count(q));
      k.transpose(data<W>(gates) + at, chunk.count(q), l.experts, l.experts, data<W>(g));
      product(all, lanes, l.rank, data<Op>(l.fc1), l.rank,
              data<Op>(chain.z) + q * l.rank * kPanel, kPanel, data<W>(h), kPanel, false);
      k.bias_relu(data<W>(h), all, l.fc1_bias, data<Op>(h_operand));
      for (int64_t e = 0; e < l.experts; ++e)
        product(l.rank, lanes, l.hidden, data<Op>(l.fc2) + e * l.rank * l.hidden, l.hidden,
                data<Op>(h_operand) + e * l.hidden * kPanel, kPanel,
                data<W>(y) + e * l.rank * kPanel, kPanel, false);
      k.combine(data<W>(y), l.experts, l.top_k, l.rank, l.fc2_bias, data<W>(g), data<W>(c));
      k.to_operand(data<W>(c), l.rank, data<Op>(chain.c) + q * l.rank * kPanel);
    }
  });
}

// out = x W' + b + scaler (c up'): the up product first, then scaled, then the frozen product on top.
// A task is one tile; those of the same rows of W share each part of them.
template <typename Op>
void to_output(const Layer<Op>& l, const Chunk& chunk, const Chain<Op>& chain, const Tensor& out) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const Cut cut = cut_of<Op>();
  const int64_t panels = chunk.blocks, depth = l.weight.defined() ? l.width : 0;
  int64_t most = cut.rows;  // fewer where tiles would not go round the threads
  while (most > kRowBlock && l.attributes * blocks_of(l.out, most) * panels < 4 * at::get_num_threads())
    most /= 2;
  const int64_t per_attribute = blocks_of(l.out, most), outs = l.attributes * l.out;
  const Op *up = data<Op>(l.up), *c = data<Op>(chain.c), *x = data<Op>(chain.x),
           *weight = depth > 0 && !l.wide ? data<Op>(l.weight) : nullptr;
  over(l.attributes * per_attribute * panels, [&](int64_t begin, int64_t end) {
    const Tensor all = l.wide_empty({panels, most * kPanel}),
                 rounded = l.op_empty({l.wide ? most : 0, cut.depth});
    W* tiles = data<W>(all);
    for (int64_t task = begin; task < end;) {
      const int64_t first = task % panels, last = std::min(panels, first + end - task);
      const int64_t block = task / panels;
      const int64_t a = block / per_attribute, o = block % per_attribute * most;
      const int64_t rows = std::min(most, l.out - o), row = a * l.out + o;
      // use(b, lanes, sums) for each tile.
      const auto each = [&](const auto& use) {
        for (int64_t b = first; b < last; ++b)
          use(b, lanes_of(chunk.count(b)), tiles + b * most * kPanel);
      };
      each([&](int64_t b, int64_t lanes, W* sums) {
        product(rows, lanes, l.rank, up + o * l.rank, l.rank,
                c + (a * panels + b) * l.rank * kPanel, kPanel, sums, kPanel, false);
        k.scale_features(sums, rows, l.scaler + row);
      });
      // The last part of a tile's product, then its output, asked of memory before.
      int64_t i = 0;
      const auto multiply = [&](int64_t b, int64_t lanes, W* sums) {
        const Op* part = l.wide ? data<Op>(rounded) : weight + row * l.width + i;
        product(rows, lanes, std::min(cut.depth, depth - i), part, l.wide ? cut.depth : l.width,
                x + (b * l.width + i) * kPanel, kPanel, sums, kPanel, true);
      };
      const auto take_part = [&] {
        for (int64_t r = 0; r < rows && l.wide; ++r)
          k.round(data<W>(l.weight) + (row + r) * l.width + i, std::min(cut.depth, depth - i),
                  data<Op>(rounded) + r * cut.depth);
      };
      for (; i + cut.depth < depth; i += cut.depth) {
        take_part();
        each(multiply);
      }
      take_part();
      each([&](int64_t b, int64_t lanes, W* sums) {
        const int64_t count = chunk.count(b);
        Op* target = data<Op>(out) + (chunk.first + chunk.start(b)) * outs + row;
        ask(target, count, outs, rows);
        if (depth > 0) multiply(b, lanes, sums);
        k.unpack(sums, count, rows, l.bias ? l.bias + row : nullptr, target, outs);
      });
      task += last - first;
    }
  });
}

}  // namespace

template <typename Op>
Outputs forward(const Arguments& arguments, bool frozen) {
  const Layer<Op> l(arguments, frozen);
  Outputs outputs{l.op_empty({l.tokens, l.attributes * l.out}), Tensor(), Tensor(),
                  l.wide_empty({l.tokens, l.attributes, l.rank}),
                  l.wide_empty({3, l.attributes, l.tokens})};
  const bool once = l.tokens > 0 && l.tokens <= kChunk;
  if (!once) {
    outputs.gates = l.wide_empty({l.attributes, l.tokens, l.experts});
    outputs.load = l.wide_zeros({l.attributes, l.experts});
  }
  for (int64_t first = 0; first < l.tokens; first += kChunk) {
    const Chunk chunk(first, l.tokens, l.attributes);
    Chain<Op> chain(l, chunk);
    to_scores(l, chunk, chain, outputs);
    const auto raw = chain.raw.defined() ? std::optional<Tensor>(chain.raw) : std::nullopt;
    const auto [gates, load] = noisy_topk_gating(chain.clean, raw, chunk.of(l.noise), l.top_k);
    if (once) {
      outputs.gates = gates;
      outputs.load = load;
    } else {
      chunk.of(outputs.gates).copy_(gates);
      outputs.load.add_(load);
    }
    if (l.grouped) {
      mix_grouped(l, chunk, chain.z, gates, chain.c);
    } else {
      mix_densely(l, chunk, chain, gates);
    }
    to_output(l, chunk, chain, outputs.out);
  }
  return outputs;
}

template Outputs forward<float>(const Arguments&, bool);
template Outputs forward<double>(const Arguments&, bool);
template Outputs forward<c10::BFloat16>(const Arguments&, bool);

}  // namespace spectralx::cpu
