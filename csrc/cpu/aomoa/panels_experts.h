// What experts do between their products: bias and ReLU, the mixture of those a token takes.
// A part of panels_impl.h.
#pragma once

namespace {

template <typename Op>
void bias_relu(Wide<Op>* h, int64_t features, const Wide<Op>* bias, Op* operand) {
  using W = Wide<Op>;
  for (int64_t f = 0; f < features; ++f) {
    W* row = h + f * kPanel;
    const W shift = bias[f];
    SPECTRALX_LANES {
      const W value = row[n] + shift;
      row[n] = value < W(0) ? W(0) : value;
    }
  }
  to_operand<Op>(h, features, operand);
}

template <typename Op>
void relu_backward(Wide<Op>* dh, const Wide<Op>* h, int64_t features, Wide<Op>* dbias) {
  using W = Wide<Op>;
  for (int64_t f = 0; f < features; ++f) {
    W* row = dh + f * kPanel;
    const W* kept = h + f * kPanel;
    // NaN in the hidden layer passes on, as its gradient is NaN.
    SPECTRALX_LANES row[n] = kept[n] == W(0) ? W(0) : row[n];
  }
  add_lanes(dh, features, dbias);
}

// The taken terms of 32 tokens, slot by slot: the n-th expert a token takes, in order.
constexpr int64_t kSlots = 4;  // more are taken without slots

// log(g0 exp(y0) + g1 exp(y1)) over the gates that are not 0: of the larger term, y1 where `swapped`, the
// exponential is 1, of the other it is `beside`. y is -infinity where its gate is 0 for want of an expert.
template <typename W>
struct TwoTerms {
  bool swapped;
  W beside, total, value;

  inline __attribute__((always_inline)) TwoTerms(W y0, W g0, W y1, W g1) {
    const W first = g0 != W(0) ? y0 : -std::numeric_limits<W>::infinity();
    const W second = g1 != W(0) ? y1 : -std::numeric_limits<W>::infinity();
    swapped = second > first;
    const W peak = swapped ? second : first, other = swapped ? first : second;
    const W of_peak = swapped ? g1 : g0, of_other = swapped ? g0 : g1;
    // Not the least exponential where there is no other term: its products would be denormal.
    beside = of_other != W(0) ? exponential(other - peak) : W(0);
    total = of_peak + of_other * beside;
    const W sum = peak + logarithm(total);
    value = total == W(0) ? static_cast<W>(kLogEpsilon) : sum;
  }
};

template <typename W>
inline void combine_two(const W* const (&y)[2], const W* const (&gates)[2], W* c) {
  const W *y0 = y[0], *y1 = y[1], *g0 = gates[0], *g1 = gates[1];
  SPECTRALX_LANES c[n] = TwoTerms<W>(y0[n], g0[n], y1[n], g1[n]).value;
}

// The same, and from c's gradient dc those of y, which y becomes, and of the gates, added to dgates:
// what a term weighs in c is its exponential over the sum.
template <typename W>
inline void combine_two_both(W* const (&y)[2], const W* const (&gates)[2], const W* dc, W* c, W* dgates) {
  W *y0 = y[0], *y1 = y[1], *d0 = dgates, *d1 = dgates + kPanel;
  const W *g0 = gates[0], *g1 = gates[1];
  SPECTRALX_LANES {
    const TwoTerms<W> terms(y0[n], g0[n], y1[n], g1[n]);
    c[n] = terms.value;
    const W at_peak = dc[n] / terms.total, at_other = at_peak * terms.beside;
    const W along0 = terms.swapped ? at_other : at_peak, along1 = terms.swapped ? at_peak : at_other;
    d0[n] += g0[n] != W(0) ? along0 : W(0);
    d1[n] += g1[n] != W(0) ? along1 : W(0);
    y0[n] = g0[n] != W(0) ? g0[n] * along0 : W(0);
    y1[n] = g1[n] != W(0) ? g1[n] * along1 : W(0);
  }
}

template <typename Op>
void combine(Wide<Op>* y, int64_t experts, int64_t top_k, int64_t r, const Wide<Op>* bias,
             const Wide<Op>* gates, Wide<Op>* c) {
  using W = Wide<Op>;
  constexpr W kNone = -std::numeric_limits<W>::infinity();
  const bool by_slot = top_k <= kSlots && top_k < experts;
  const int64_t terms = by_slot ? top_k : experts;
  int32_t expert[kSlots][kPanel];
  W weight[kSlots][kPanel], y_of[kSlots][kPanel];
  if (by_slot) {
    for (int64_t n = 0; n < kPanel; ++n) {
      int64_t slot = 0;
      for (int64_t e = 0; e < experts && slot < top_k; ++e) {
        if (gates[e * kPanel + n] == W(0)) continue;  // NaN takes part
        expert[slot][n] = static_cast<int32_t>(e);
        weight[slot++][n] = gates[e * kPanel + n];
      }
      for (; slot < top_k; ++slot) {
        expert[slot][n] = -1;
        weight[slot][n] = W(0);
      }
    }
  }
  for (int64_t i = 0; i < r; ++i) {
    W peak[kPanel], total[kPanel] = {};
    SPECTRALX_LANES peak[n] = kNone;
    if (by_slot) {
      std::fill(y_of[0], y_of[0] + terms * kPanel, kNone);
    }
    for (int64_t e = 0; e < experts; ++e) {
      W* row = y + (e * r + i) * kPanel;
      const W shift = bias ? bias[e * r + i] : W(0);
      SPECTRALX_LANES row[n] += shift;
      if (by_slot) {
        for (int64_t slot = 0; slot < terms; ++slot) {
          const int32_t* wanted = expert[slot];
          W* value = y_of[slot];
          SPECTRALX_LANES value[n] = wanted[n] == static_cast<int32_t>(e) ? row[n] : value[n];
        }
      } else {
        const W* gate = gates + e * kPanel;
        SPECTRALX_LANES {
          const W term = gate[n] != W(0) ? row[n] : kNone;
          peak[n] = term > peak[n] ? term : peak[n];
        }
      }
    }
    W* out = c + i * kPanel;
    if (terms == 2) {
      const W* const rows[2] = {by_slot ? y_of[0] : y + i * kPanel,
                                by_slot ? y_of[1] : y + (r + i) * kPanel};
      const W* const weights[2] = {by_slot ? weight[0] : gates, by_slot ? weight[1] : gates + kPanel};
      combine_two(rows, weights, out);
      continue;
    }
    if (by_slot) {
      for (int64_t slot = 0; slot < terms; ++slot) {
        const W* value = y_of[slot];
        SPECTRALX_LANES peak[n] = value[n] > peak[n] ? value[n] : peak[n];
      }
    }
    for (int64_t term = 0; term < terms; ++term) {
      const W* row = by_slot ? y_of[term] : y + (term * r + i) * kPanel;
      const W* gate = by_slot ? weight[term] : gates + term * kPanel;
      SPECTRALX_LANES {
        const W value = gate[n] * exponential(row[n] - peak[n]);
        total[n] += gate[n] != W(0) ? value : W(0);
      }
    }
    SPECTRALX_LANES {
      const W value = peak[n] + logarithm(total[n]);
      out[n] = total[n] == W(0) ? static_cast<W>(kLogEpsilon) : value;
    }
  }
}

// Of term e: its rows become their gradient, that of its gate is added to dgate.
template <typename W>
inline void combine_gradient(W* y, int64_t r, const W* gate, const W* c, const W* dc, W* dgate) {
  for (int64_t i = 0; i < r; ++i) {
    W* row = y + i * kPanel;
    const W *combined = c + i * kPanel, *grad = dc + i * kPanel;
    SPECTRALX_LANES {
      const W per_gate = grad[n] * exponential(row[n] - combined[n]);
      dgate[n] += gate[n] != W(0) ? per_gate : W(0);
      row[n] = gate[n] != W(0) ? gate[n] * per_gate : W(0);
    }
  }
}

template <typename Op>
void combine_backward(Wide<Op>* y, int64_t experts, int64_t r, const Wide<Op>* gates,
                      const Wide<Op>* c, const Wide<Op>* dc, Wide<Op>* dgates,
                      Wide<Op>* dbias) {
  std::fill_n(dgates, experts * kPanel, Wide<Op>(0));
  for (int64_t e = 0; e < experts; ++e) {
    combine_gradient(y + e * r * kPanel, r, gates + e * kPanel, c, dc, dgates + e * kPanel);
    add_lanes(y + e * r * kPanel, r, dbias + e * r);
  }
}

// use(i, count) for every 64 features, or `count`, from i on, which stay in the L1 cache: their terms
// [k][count][32].
template <typename W, typename Use>
inline void for_terms(const W* y, const int64_t* columns, int64_t top_k, int64_t r, W* terms, Use use) {
  for (int64_t i = 0; i < r; i += kBlock) {
    const int64_t count = std::min(kBlock, r - i);
    for (int64_t term = 0; term < top_k; ++term) {
      const Gathered<W> gathered(columns + term * kPanel, r);
      for (int64_t f = 0; f < count; ++f)
        gathered.row(y, i + f, terms + (term * count + f) * kPanel);
    }
    use(i, count);
  }
}

// Two terms go from their slots to where they are wanted in registers: the features f and f + 1 at a time,
// which share words of an operand panel, the last of an odd number alone.
template <typename Op>
void mix(const Wide<Op>* y, const int64_t* columns, int64_t top_k, int64_t r, const Wide<Op>* gates,
         Wide<Op>* terms, Op* c) {
  using W = Wide<Op>;
  if (top_k != 2) {
    for_terms(y, columns, top_k, r, terms, [&](int64_t i, int64_t count) {
      W mixed[kBlock * kPanel];
      combine<Op>(terms, top_k, top_k, count, nullptr, gates, mixed);
      to_operand<Op>(mixed, count, c + i * kPanel);
    });
    return;
  }
  const Gathered<W> first(columns, r), second(columns + kPanel, r);
  const W* const weights[2] = {gates, gates + kPanel};
  const auto mixture = [&](int64_t f, W* mixed) __attribute__((always_inline)) {
    W term[2][kPanel];
    first.row(y, f, term[0]);
    second.row(y, f, term[1]);
    combine_two<W>({term[0], term[1]}, weights, mixed);
  };
  if constexpr (sizeof(Op) == 2) {
    for (int64_t f = 0; f < r; f += 2) {
      W low[kPanel], high[kPanel];
      mixture(f, low);
      mixture(f + 1, high);
      store_pair<Op>(low, high, c, f);
    }
  } else {
    for (int64_t f = 0; f < r; ++f) mixture(f, c + f * kPanel);
  }
}

template <typename Op>
void unmix(const Wide<Op>* y, const int64_t* columns, int64_t top_k, int64_t r,
           const Wide<Op>* gates, const Wide<Op>* dc, Wide<Op>* terms, Op* c, int64_t stride, Op* dy,
           Wide<Op>* dgates) {
  using W = Wide<Op>;
  std::fill_n(dgates, top_k * kPanel, W(0));
  if (top_k != 2) {
    for_terms(y, columns, top_k, r, terms, [&](int64_t i, int64_t count) {
      W mixed[kBlock * kPanel];
      combine<Op>(terms, top_k, top_k, count, nullptr, gates, mixed);
      for (int64_t term = 0; term < top_k; ++term) {
        W* values = terms + term * count * kPanel;
        combine_gradient(values, count, gates + term * kPanel, mixed, dc + i * kPanel,
                         dgates + term * kPanel);
        to_operand<Op>(values, count, dy + (term * r + i) * kPanel);
      }
      to_features<Op>(mixed, count, c + i * stride, stride);
    });
    return;
  }
  const Gathered<W> first(columns, r), second(columns + kPanel, r);
  const W* const weights[2] = {gates, gates + kPanel};
  const auto gradients = [&](int64_t f, W (&term)[2][kPanel]) __attribute__((always_inline)) {
    W mixed[kPanel];
    first.row(y, f, term[0]);
    second.row(y, f, term[1]);
    combine_two_both<W>({term[0], term[1]}, weights, dc + f * kPanel, mixed, dgates);
    fetch_to_write(c + std::min(f + kFetched, r - 1) * stride, kPanel);
    round_row<Op>(mixed, kPanel, c + f * stride);
  };
  if constexpr (sizeof(Op) == 2) {
    for (int64_t f = 0; f < r; f += 2) {
      W low[2][kPanel], high[2][kPanel];
      gradients(f, low);
      gradients(f + 1, high);
      for (int64_t term = 0; term < 2; ++term)
        store_pair<Op>(low[term], high[term], dy + term * r * kPanel, f);
    }
  } else {
    for (int64_t f = 0; f < r; ++f) {
      W term[2][kPanel];
      gradients(f, term);
      std::copy_n(term[0], kPanel, dy + f * kPanel);
      std::copy_n(term[1], kPanel, dy + (r + f) * kPanel);
    }
  }
}

}  // namespace
