// Layouts of a panel: operands of products, rows of tokens or features, and back; columns gathered into
// panels of their own.
// A part of panels_impl.h.
#pragma once

namespace {

// Rows that loops over rows far apart ask of memory ahead of use.
constexpr int64_t kFetched = 8;

// Asks for `count` values that are read, or written, soon.
template <typename T>
inline void fetch(const T* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(values + i, 0, 3);
}
template <typename T>
inline void fetch_to_write(const T* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(values + i, 1, 3);
}

// Feature f of an operand panel, and back. For bfloat16 f and f + 1 share words.
template <typename Op, typename Use>
inline void for_features(const Op* panel, int64_t features, Use use) {
  using W = Wide<Op>;
  if constexpr (sizeof(Op) == 2) {
    for (int64_t f = 0; f < features; f += 2) {
      const uint32_t* row = words(panel) + f / 2 * kPanel;
      W low[kPanel], high[kPanel];
      SPECTRALX_LANES {
        low[n] = from_bits(row[n] & 0xffffu);
        high[n] = std::bit_cast<float>(row[n] & 0xffff0000u);
      }
      use(f, low);
      use(f + 1, high);
    }
  } else {
    for (int64_t f = 0; f < features; ++f) use(f, panel + f * kPanel);
  }
}

template <typename Op>
void transpose(const Wide<Op>* rows, int64_t n, int64_t stride, int64_t features,
               Wide<Op>* panel) {
  transpose_words(rows, n, stride, features, panel, kPanel);
  clear_lanes(panel, features, n);
}

template <typename Op>
void unpack_wide(const Wide<Op>* panel, int64_t n, int64_t features, Wide<Op>* rows,
                 int64_t stride) {
  transpose_words(panel, features, kPanel, n, rows, stride);
}

template <typename Op>
void unpack(const Wide<Op>* panel, int64_t n, int64_t features, const Wide<Op>* bias, Op* rows,
            int64_t stride) {
  using W = Wide<Op>;
  W block[kPanel * kBlock];
  for (int64_t f0 = 0; f0 < features; f0 += kBlock) {
    const int64_t width = std::min(kBlock, features - f0);
    transpose_words(panel + f0 * kPanel, width, kPanel, n, block, kBlock);
    for (int64_t t = 0; t < n; ++t) {
      const W* from = block + t * kBlock;
      auto* to = elements(rows + t * stride + f0);
#pragma omp simd
      for (int64_t f = 0; f < width; ++f)
        to[f] = rounded<Op>(bias ? from[f] + bias[f0 + f] : from[f]);
    }
  }
}

// Two features' lanes to their row of an operand panel.
template <typename Op>
inline void store_pair(const Wide<Op>* low, const Wide<Op>* high, Op* operand, int64_t f) {
  if constexpr (sizeof(Op) == 2) {
    uint32_t* row = words(operand) + f / 2 * kPanel;
    SPECTRALX_LANES row[n] = bfloat16_bits(low[n]) | bfloat16_bits(high[n]) << 16;
  } else {
    SPECTRALX_LANES operand[f * kPanel + n] = low[n];
    SPECTRALX_LANES operand[(f + 1) * kPanel + n] = high[n];
  }
}

template <typename Op>
void widen(const Op* operand, int64_t features, Wide<Op>* panel) {
  using W = Wide<Op>;
  for_features<Op>(operand, features, [&](int64_t f, const W* row) {
    SPECTRALX_LANES panel[f * kPanel + n] = row[n];
  });
}

template <typename Op>
void to_operand(const Wide<Op>* panel, int64_t features, Op* operand) {
  if constexpr (sizeof(Op) == 2) {
    for (int64_t f = 0; f < features; f += 2)
      store_pair<Op>(panel + f * kPanel, panel + (f + 1) * kPanel, operand, f);
  } else {
    std::copy(panel, panel + features * kPanel, operand);
  }
}

template <typename Op>
void to_features(const Wide<Op>* panel, int64_t features, Op* rows, int64_t stride) {
  for (int64_t f = 0; f < features; ++f) {
    fetch_to_write(rows + std::min(f + kFetched, features - 1) * stride, kPanel);
    const Wide<Op>* from = panel + f * kPanel;
    auto* to = elements(rows + f * stride);
    SPECTRALX_LANES to[n] = rounded<Op>(from[n]);
  }
}

template <typename Op>
void to_tokens(const Wide<Op>* panel, int64_t features, Op* operand, int64_t width) {
  if constexpr (sizeof(Op) == 2) {
    constexpr int64_t kPairs = kPanel / 2;
    uint32_t block[kBlock * kPairs];
    for (int64_t f0 = 0; f0 < features; f0 += kBlock) {
      const int64_t count = std::min(kBlock, features - f0);
      to_features<Op>(panel + f0 * kPanel, count, reinterpret_cast<Op*>(block), kPanel);
      transpose_words(block, count, kPairs, kPairs, words(operand) + f0, width);
    }
  } else {
    transpose_words(panel, features, kPanel, kPanel, operand, width);
  }
}

#ifdef SPECTRALX_SHUFFLES
// Sixteen lanes that are gathered: the vectors they come from, and which lane of one goes where.
struct Picks {
  int64_t count = 0, from[16];  // from: the vector's first lane
  Lanes lane[16], taken[16];    // taken: all bits set, or none
};

// gather_rows for values of 32 bits. Neighbouring columns come from few vectors, so a shuffle of each
// costs less than a gather.
template <typename T, typename Use>
inline void shuffle_rows(const T* panels, const int64_t* columns, int64_t rows, Use use) {
  Picks picks[2];
  for (int64_t n = 0; n < kPanel; ++n) {
    if (columns[n] < 0) continue;
    const int64_t from = columns[n] / kPanel * rows * kPanel + columns[n] % kPanel / 16 * 16;
    Picks& half = picks[n / 16];
    int64_t i = 0;
    while (i < half.count && half.from[i] != from) ++i;
    if (i == half.count) {
      half.from[half.count++] = from;
      half.lane[i] = half.taken[i] = Lanes{};
    }
    half.lane[i][n % 16] = static_cast<uint32_t>(columns[n] % 16);
    half.taken[i][n % 16] = 0xffffffffu;
  }
  for (int64_t i = 0; i < rows; ++i, panels += kPanel) {
    T lanes[kPanel];
    for (int64_t h = 0; h < 2; ++h) {
      Lanes sum = {};
      for (int64_t j = 0; j < picks[h].count; ++j) {
        Lanes vector;
        std::memcpy(&vector, panels + picks[h].from[j], sizeof vector);
        sum |= __builtin_shuffle(vector, picks[h].lane[j]) & picks[h].taken[j];
      }
      std::memcpy(lanes + 16 * h, &sum, sizeof sum);
    }
    use(i, lanes);
  }
}
#endif

// use(row, lanes) for every row of the gathered panel.
template <typename T, typename Use>
inline void gather_rows(const T* panels, const int64_t* columns, int64_t rows, Use use) {
#ifdef SPECTRALX_SHUFFLES
  if constexpr (sizeof(T) == 4) return shuffle_rows(panels, columns, rows, use);
#endif
  // The lane of an empty column reads a valid one.
  int64_t offset[kPanel];
  for (int64_t n = 0; n < kPanel; ++n) {
    const int64_t column = std::max<int64_t>(columns[n], 0);
    offset[n] = column / kPanel * rows * kPanel + column % kPanel;
  }
  for (int64_t i = 0; i < rows; ++i, panels += kPanel) {
    T lanes[kPanel];
    SPECTRALX_LANES {
      const T value = panels[offset[n]];
      lanes[n] = columns[n] < 0 ? T(0) : value;
    }
    use(i, lanes);
  }
}

template <typename Op>
void gather_operand(const Op* panels, const int64_t* columns, int64_t features, Op* operand) {
  if constexpr (sizeof(Op) == 2) {
    gather_rows(words(panels), columns, features / 2, [&](int64_t i, const uint32_t* lanes) {
      SPECTRALX_LANES words(operand)[i * kPanel + n] = lanes[n];
    });
  } else {
    gather_rows(panels, columns, features, [&](int64_t i, const Op* lanes) {
      SPECTRALX_LANES operand[i * kPanel + n] = lanes[n];
    });
  }
}

template <typename Op>
void gather(const Wide<Op>* panels, const int64_t* columns, int64_t features, bool add,
            Wide<Op>* panel) {
  using W = Wide<Op>;
  gather_rows(panels, columns, features, [&](int64_t i, const W* lanes) {
    W* to = panel + i * kPanel;
    if (add) {
      SPECTRALX_LANES to[n] += lanes[n];
    } else {
      SPECTRALX_LANES to[n] = lanes[n];
    }
  });
}

template <typename Op>
void pack_tokens(const Op* rows, int64_t tokens, int64_t stride, int64_t columns,
                 const Wide<Op>* mean, const Wide<Op>* rstd, Op* operand) {
  using W = Wide<Op>;
  if constexpr (sizeof(Op) == 2) {
    for (int64_t t = 0; t < tokens; t += 2) {
      fetch(rows + std::min(t + kFetched, tokens - 1) * stride, columns);
      fetch(rows + std::min(t + kFetched + 1, tokens - 1) * stride, columns);
      const bool paired = t + 1 < tokens;
      const auto *low = reinterpret_cast<const uint16_t*>(rows + t * stride),
                 *high = paired ? low + stride : low;
      const uint32_t kept = paired ? 0xffffffffu : 0xffffu;
      uint32_t* to = words(operand) + t / 2 * kBlock;
      if (mean == nullptr) {
#pragma omp simd
        for (int64_t n = 0; n < columns; ++n)
          to[n] = (static_cast<uint32_t>(low[n]) | static_cast<uint32_t>(high[n]) << 16) & kept;
      } else {
        const int64_t other = paired ? t + 1 : t;
        const W m0 = mean[t], m1 = mean[other], s0 = rstd[t], s1 = rstd[other];
#pragma omp simd
        for (int64_t n = 0; n < columns; ++n)
          to[n] = (bfloat16_bits((from_bits(low[n]) - m0) * s0) |
                   bfloat16_bits((from_bits(high[n]) - m1) * s1) << 16) &
                  kept;
      }
      std::fill(to + columns, to + kBlock, 0u);
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t) {
      fetch(rows + std::min(t + kFetched, tokens - 1) * stride, columns);
      const Op* from = rows + t * stride;
      Op* to = operand + t * kBlock;
      const W center = mean ? mean[t] : W(0), scale = mean ? rstd[t] : W(1);
#pragma omp simd
      for (int64_t n = 0; n < columns; ++n) to[n] = (from[n] - center) * scale;
      std::fill(to + columns, to + kBlock, Op(0));
    }
  }
  const int64_t written = sizeof(Op) == 2 ? tokens + tokens % 2 : tokens;
  const int64_t all = (tokens + kPanel - 1) / kPanel * kPanel;
  std::memset(static_cast<void*>(operand + written * kBlock), 0,
              sizeof(Op) * (all - written) * kBlock);
}

}  // namespace
