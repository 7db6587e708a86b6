// Experts on grouped tokens. A column is one lane of one panel of the chunk: one attribute of one
// token. The columns that take an expert become the slots of its own panels, the last one filled up
// with empty slots, which hold zeros where a sum would see them. Both directions gather: slots read
// columns, columns read the at most k slots they fill, in the experts' order.
//
// Slots depend on the gates alone, a slot panel belongs to one thread, and what panels add up is
// added in their order: the number of threads changes no bit. Products have few sizes whatever the
// gates: each new size costs a micro-kernel that is compiled and kept.
#include "cpu/torch.h"

#include "cpu/aomoa/grouped.h"

#include <cstdlib>
#include <memory>
#include <string_view>

namespace spectralx::cpu {

namespace {

// Panels of slots, and slots, that one product of a weight's gradient takes.
constexpr int64_t kSide = 4, kSlots = kSide * kPanel;

template <typename W>
struct Slots {
  int64_t top_k, panels = 0;              // k; panels of slots
  std::vector<int64_t> first;             // [E + 1]: expert e has the panels from first[e] on
  std::vector<int64_t> expert;            // [panels]
  std::vector<int64_t> columns, terms;    // [panels][32]: a slot's column, and its term, or -1
  // A column's terms, [chunk's panels][k][32]: expert and slot, or -1; gate, or 0.
  std::vector<int64_t> expert_of, slot_of;
  std::vector<W> gates;

  // Where slot panel p begins among those side by side.
  int64_t beside(int64_t p, int64_t features) const {
    return place[p] / kSide * features * kSlots + place[p] % kSide * kPanel;
  }
  // The first term of panel q.
  int64_t term(int64_t q) const { return q * top_k * kPanel; }

  // kSide panels of an expert side by side, [rows][..][kSlots]: how many rows, and the place of a panel.
  int64_t rows = 0;
  std::vector<int64_t> place;  // [panels]: kSide * row + its panel

  Slots(const Chunk& chunk, const W* all, int64_t experts, int64_t top_k_)
      : top_k(top_k_), first(experts + 1), expert_of(term(chunk.panels), -1),
        slot_of(term(chunk.panels), -1), gates(term(chunk.panels), W(0)) {
    std::vector<int64_t> next(experts);  // counts, then the next free slot
    for (int64_t q = 0; q < chunk.panels; ++q) {
      for (int64_t n = 0; n < chunk.count(q); ++n) {
        const W* row = all + (chunk.attribute(q) * chunk.tokens + chunk.start(q) + n) * experts;
        int64_t at = term(q) + n;
        for (int64_t e = 0; e < experts && at < term(q + 1); ++e) {
          if (row[e] == W(0)) continue;  // NaN takes part
          expert_of[at] = e;
          gates[at] = row[e];
          ++next[e];
          at += kPanel;
        }
      }
    }
    for (int64_t e = 0; e < experts; ++e) {
      first[e] = panels;
      panels += blocks_of(next[e], kPanel);
      expert.resize(panels, e);
      for (int64_t p = first[e]; p < panels; ++p) place.push_back(kSide * rows + p - first[e]);
      rows += blocks_of(panels - first[e], kSide);
      next[e] = first[e] * kPanel;
    }
    first[experts] = panels;
    columns.resize(panels * kPanel, -1);
    terms.resize(panels * kPanel, -1);
    for (int64_t q = 0; q < chunk.panels; ++q) {
      for (int64_t n = 0; n < chunk.count(q); ++n) {
        for (int64_t at = term(q) + n; at < term(q + 1) && expert_of[at] >= 0; at += kPanel) {
          const int64_t slot = next[expert_of[at]]++;
          slot_of[at] = slot;
          columns[slot] = q * kPanel + n;
          terms[slot] = at;
        }
      }
    }
  }
};

// Slot panel p of expert e: hidden layer h [h][32], also as an operand, and y [r][32] with its bias.
template <typename Op>
void run_expert(const Layer<Op>& l, int64_t e, const Op* z, Wide<Op>* h, Op* h_operand,
                Wide<Op>* y) {
  using W = Wide<Op>;
  const int64_t size = l.hidden * l.rank;
  product(l.hidden, kPanel, l.rank, data<Op>(l.fc1) + e * size, l.rank, z, kPanel, h, kPanel,
          false);
  l.k.bias_relu(h, l.hidden, l.fc1_bias + e * l.hidden, h_operand);
  const W* bias = l.fc2_bias + e * l.rank;
  for (int64_t i = 0; i < l.rank; ++i) std::fill_n(y + i * kPanel, kPanel, bias[i]);
  product(l.rank, kPanel, l.hidden, data<Op>(l.fc2) + e * size, l.hidden, h_operand, kPanel, y,
          kPanel, true);
}

// What backward keeps of the slots between its phases.
template <typename Op>
struct SlotTrail {
  using W = Wide<Op>;
  Tensor z, terms;                 // operand panels: [panels][r][32]; y's gradient [panels][k][r][32]
  // Of slot panels [h][32], [r][32], and one more to read by columns without slots; y becomes z's
  // gradient.
  Tensor h, y;
  Tensor z_features, y_grad_features;  // of slot panels side by side, of Op [r][kSlots]
  Tensor h_tokens, h_grad_tokens;  // of slot panels, right operands [32][h]
  Tensor sums;                     // of slot panels [h + r]: gradients of the experts' biases

  SlotTrail(const Backward<Op>& l, const Chunk& chunk, int64_t panels, int64_t rows)
      : z(l.op_empty({chunk.panels, l.rank, kPanel})),
        terms(l.op_empty({chunk.panels, l.top_k, l.rank, kPanel})),
        h(l.wide_empty({panels, l.hidden, kPanel})), y(l.wide_empty({panels + 1, l.rank, kPanel})),
        z_features(l.op_empty({rows, l.rank, kSlots})), y_grad_features(at::empty_like(z_features)),
        h_tokens(l.op_empty({panels, kPanel, l.hidden})), h_grad_tokens(at::empty_like(h_tokens)),
        sums(l.wide_empty({panels, l.hidden + l.rank})) {}
};

// z of slots, then their hidden layer and y.
template <typename Op>
void to_slots(const Backward<Op>& l, const Slots<Wide<Op>>& slots, const SlotTrail<Op>& kept) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t rank_size = l.rank * kPanel, hidden_size = l.hidden * kPanel;
  over(slots.panels, [&](int64_t begin, int64_t end) {
    const Tensor z = l.op_empty({l.rank, kPanel}), h_operand = l.op_empty({l.hidden, kPanel});
    for (int64_t p = begin; p < end; ++p) {
      W* h = data<W>(kept.h) + p * hidden_size;
      k.gather_operand(data<Op>(kept.z), slots.columns.data() + p * kPanel, l.rank, data<Op>(z));
      k.spread(data<Op>(z), l.rank, data<Op>(kept.z_features) + slots.beside(p, l.rank), kSlots);
      run_expert(l, slots.expert[p], data<Op>(z), h, data<Op>(h_operand),
                 data<W>(kept.y) + p * rank_size);
      k.to_tokens(h, l.hidden, data<Op>(kept.h_tokens) + p * hidden_size, l.hidden);
    }
  });
}

// Mixture of every column, and the gradients of its gates and terms.
template <typename Op>
void to_terms(const Backward<Op>& l, const Chunk& chunk, const Incoming& in,
              const Slots<Wide<Op>>& slots, const SlotTrail<Op>& kept, const Trail<Op>& trail) {
  using W = Wide<Op>;
  over(chunk.panels, [&](int64_t begin, int64_t end) {
    const Tensor terms = l.wide_empty({l.top_k, kBlock, kPanel}), dc = l.wide_empty({l.rank, kPanel}),
                 dout = l.op_empty({l.out, kPanel}), dg = l.wide_empty({l.top_k, kPanel});
    for (int64_t q = begin; q < end; ++q) {
      to_mixture(l, chunk, in, q, data<Op>(dout), data<W>(dc));
      l.k.unmix(data<W>(kept.y), slots.slot_of.data() + slots.term(q), l.top_k, l.rank,
                slots.gates.data() + slots.term(q), data<W>(dc), data<W>(terms),
                data<Op>(trail.c_features) + chunk.attribute(q) * l.rank * trail.padded + chunk.start(q),
                trail.padded, data<Op>(kept.terms) + q * l.top_k * l.rank * kPanel, data<W>(dg));
      W* gates_grad = data<W>(trail.gates_grad) +
                      (chunk.attribute(q) * chunk.tokens + chunk.start(q)) * l.experts;
      std::fill_n(gates_grad, chunk.count(q) * l.experts, W(0));
      for (int64_t i = 0; i < l.top_k * kPanel; ++i) {
        const int64_t e = slots.expert_of[slots.term(q) + i];
        if (e >= 0) gates_grad[i % kPanel * l.experts + e] = data<W>(dg)[i];
      }
    }
  });
}

// Gradients of y of slots to those of their z.
template <typename Op>
void from_slots(const Backward<Op>& l, const Slots<Wide<Op>>& slots, const SlotTrail<Op>& kept) {
  using W = Wide<Op>;
  const auto& k = l.k;
  const int64_t rank_size = l.rank * kPanel, hidden_size = l.hidden * kPanel;
  over(slots.panels, [&](int64_t begin, int64_t end) {
    const Tensor dy = l.op_empty({l.rank, kPanel}), dh = l.wide_empty({l.hidden, kPanel}),
                 dh_operand = l.op_empty({l.hidden, kPanel});
    for (int64_t p = begin; p < end; ++p) {
      const int64_t weights = slots.expert[p] * l.hidden * l.rank;
      W* sums = data<W>(kept.sums) + p * (l.hidden + l.rank);
      std::fill_n(sums, l.hidden + l.rank, W(0));
      k.gather_operand(data<Op>(kept.terms), slots.terms.data() + p * kPanel, l.rank, data<Op>(dy));
      k.add_operand_sums(data<Op>(dy), l.rank, sums + l.hidden);
      k.spread(data<Op>(dy), l.rank, data<Op>(kept.y_grad_features) + slots.beside(p, l.rank), kSlots);
      product(l.hidden, kPanel, l.rank, data<Op>(l.fc2_t) + weights, l.rank, data<Op>(dy), kPanel,
              data<W>(dh), kPanel, false);
      k.relu_backward(data<W>(dh), data<W>(kept.h) + p * hidden_size, l.hidden, sums);
      k.to_operand(data<W>(dh), l.hidden, data<Op>(dh_operand));
      k.to_tokens(data<W>(dh), l.hidden, data<Op>(kept.h_grad_tokens) + p * hidden_size, l.hidden);
      product(l.rank, kPanel, l.hidden, data<Op>(l.fc1_t) + weights, l.hidden, data<Op>(dh_operand),
              kPanel, data<W>(kept.y) + p * rank_size, kPanel, false);
    }
  });
}

// Products over the slots of each expert, added to its weights' and biases' gradients. Experts are
// dealt out within a block of rows, as their numbers of slots differ.
template <typename Op>
void to_experts(const Backward<Op>& l, const Chunk& chunk, const Slots<Wide<Op>>& slots,
                const SlotTrail<Op>& kept) {
  using W = Wide<Op>;
  const int64_t hidden_size = l.hidden * kPanel;
  over(blocks_of(l.rank, kRowBlock) * l.experts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t e = task % l.experts, i = task / l.experts * kRowBlock;
      const int64_t rows = std::min(kRowBlock, l.rank - i);
      for (int64_t j = 0; j < l.hidden; j += kBlock) {
        const int64_t width = std::min(kBlock, l.hidden - j), at = (e * l.rank + i) * l.hidden + j;
        const auto add = [&](const Tensor& features, const Tensor& tokens, const Tensor& grad) {
          const int64_t last = slots.first[e + 1];
          bool sums = chunk.first > 0;  // else the first product puts them down
          for (int64_t p = slots.first[e]; p < last; p += kSide) {
            const Op* left = data<Op>(features) + slots.beside(p, l.rank) + i * kSlots;
            if (p + kSide < last) ask(left + l.rank * kSlots, rows, kSlots, kSlots);
            product(rows, width, std::min(kSide, last - p) * kPanel, left, kSlots,
                    data<Op>(tokens) + p * hidden_size + j * kColumn<Op>, l.hidden,
                    data<W>(grad) + at, l.hidden, sums);
            sums = true;
          }
          for (int64_t row = 0; row < rows && !sums; ++row)
            std::fill_n(data<W>(grad) + at + row * l.hidden, width, W(0));
        };
        add(kept.y_grad_features, kept.h_tokens, l.fc2_grad);
        add(kept.z_features, kept.h_grad_tokens, l.fc1_t_grad);
      }
    }
  });
  for (int64_t p = 0; p < slots.panels; ++p) {
    const W* from = data<W>(kept.sums) + p * (l.hidden + l.rank);
    W* fc1_bias = data<W>(l.sums) + slots.expert[p] * l.hidden;
    W* fc2_bias = data<W>(l.sums) + l.all_hidden + slots.expert[p] * l.rank;
    for (int64_t j = 0; j < l.hidden; ++j) fc1_bias[j] += from[j];
    for (int64_t i = 0; i < l.rank; ++i) fc2_bias[i] += from[l.hidden + i];
  }
}

}  // namespace

bool groups_experts(int64_t experts, int64_t top_k) {
  const char* value = std::getenv("SPECTRALX_AOMOA_EXPERTS");
  if (value != nullptr && *value != 0) {
    const std::string_view wanted = value;
    TORCH_CHECK(wanted == "dense" || wanted == "grouped", "SPECTRALX_AOMOA_EXPERTS: got ", wanted,
                ", expected dense or grouped");
    return wanted == "grouped";
  }
  return experts >= 2 * top_k;
}

template <typename Op>
void mix_grouped(const Layer<Op>& l, const Chunk& chunk, const Tensor& z, const Tensor& gates,
                 const Tensor& c) {
  using W = Wide<Op>;
  const Slots<W> slots(chunk, data<W>(gates), l.experts, l.top_k);
  const Tensor y_slots = l.wide_empty({slots.panels + 1, l.rank, kPanel});  // one, if none is taken
  over(slots.panels, [&](int64_t begin, int64_t end) {
    const Tensor z_slots = l.op_empty({l.rank, kPanel}), h = l.wide_empty({l.hidden, kPanel}),
                 h_operand = l.op_empty({l.hidden, kPanel});
    for (int64_t p = begin; p < end; ++p) {
      l.k.gather_operand(data<Op>(z), slots.columns.data() + p * kPanel, l.rank, data<Op>(z_slots));
      run_expert(l, slots.expert[p], data<Op>(z_slots), data<W>(h), data<Op>(h_operand),
                 data<W>(y_slots) + p * l.rank * kPanel);
    }
  });
  over(chunk.panels, [&](int64_t begin, int64_t end) {
    const Tensor terms = l.wide_empty({l.top_k, kBlock, kPanel});
    for (int64_t q = begin; q < end; ++q)
      l.k.mix(data<W>(y_slots), slots.slot_of.data() + slots.term(q), l.top_k, l.rank,
              slots.gates.data() + slots.term(q), data<W>(terms), data<Op>(c) + q * l.rank * kPanel);
  });
}

template <typename Op>
void unmix_grouped(const Backward<Op>& l, const Chunk& chunk, const Incoming& in,
                   Trail<Op>& trail) {
  using W = Wide<Op>;
  const Tensor gates = chunk.of(in.kept_gates).contiguous();
  // Which live on for what the trail gathers.
  const auto all = std::make_shared<const Slots<W>>(chunk, data<W>(gates), l.experts, l.top_k);
  const Slots<W>& slots = *all;
  const SlotTrail<Op> kept(l, chunk, slots.panels, slots.rows);
  over(chunk.panels, [&](int64_t begin, int64_t end) {
    const Tensor z = l.wide_empty({l.rank, kPanel}), scores = l.wide_empty({l.scores, kPanel});
    for (int64_t q = begin; q < end; ++q) {
      restore(l, chunk, in, trail, q, data<W>(z), data<W>(scores));
      l.k.to_operand(data<W>(z), l.rank, data<Op>(kept.z) + q * l.rank * kPanel);
    }
  });
  to_slots(l, slots, kept);
  to_terms(l, chunk, in, slots, kept, trail);
  from_slots(l, slots, kept);
  trail.gather_dz = [&l, all, dz = kept.y](int64_t q, W* to) {
    for (int64_t s = 0; s < l.top_k; ++s)
      l.k.gather(data<W>(dz), all->slot_of.data() + all->term(q) + s * kPanel, l.rank, s > 0, to);
  };
  to_experts(l, chunk, slots, kept);
}

#define SPECTRALX_GROUPED(Op)                                                                  \
  template void mix_grouped(const Layer<Op>&, const Chunk&, const Tensor&, const Tensor&,     \
                            const Tensor&);                                                    \
  template void unmix_grouped(const Backward<Op>&, const Chunk&, const Incoming&, Trail<Op>&);

SPECTRALX_GROUPED(float)
SPECTRALX_GROUPED(double)
SPECTRALX_GROUPED(c10::BFloat16)

}  // namespace spectralx::cpu
