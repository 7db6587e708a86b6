// Layouts of a panel: operands of products, rows of tokens or features, and back; columns gathered into
// panels of their own.
// A part of panels_impl.h.
#pragma once

namespace {

// Rows that loops over rows far apart ask of memory ahead of use, into the L2 cache: rows a power of two
// apart share too few places in the L1 cache.
constexpr int64_t kFetched = 32;

// Asks for `count` values that are read, or written, soon.
template <typename T>
inline void fetch(const T* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(values + i, 0, 2);
}
template <typename T>
inline void fetch_to_write(const T* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(values + i, 1, 2);
}

// `count` values to Op. The instruction takes what is below the normal numbers for 0.
template <typename Op>
inline void round_row(const Wide<Op>* from, int64_t count, Op* to) {
  auto* values = elements(to);
  int64_t n = 0;
#ifdef SPECTRALX_CONVERTS
  if constexpr (sizeof(Op) == 2) {
    for (; n + 32 <= count; n += 32)
      _mm512_storeu_si512(values + n, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + n + 16),
                                                                   _mm512_loadu_ps(from + n)));
  }
#endif
#pragma omp simd
  for (int64_t i = n; i < count; ++i) values[i] = rounded<Op>(from[i]);
}

// The same to the low and high halves of words.
inline void round_pairs(const float* low, const float* high, int64_t count, uint32_t* to) {
  int64_t n = 0;
#ifdef SPECTRALX_CONVERTS
  alignas(64) static constexpr uint16_t kTurns[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i turns = _mm512_load_si512(kTurns);
  for (; n + 16 <= count; n += 16)
    _mm512_storeu_si512(
        to + n, _mm512_permutexvar_epi16(turns, (__m512i)_mm512_cvtne2ps_pbh(
                                                    _mm512_loadu_ps(high + n), _mm512_loadu_ps(low + n))));
#endif
#pragma omp simd
  for (int64_t i = n; i < count; ++i) to[i] = bfloat16_bits(low[i]) | bfloat16_bits(high[i]) << 16;
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
  transpose_rows(rows, n, stride, features, panel, kPanel);
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
      W* from = block + t * kBlock;
      if (bias) {
#pragma omp simd
        for (int64_t f = 0; f < width; ++f) from[f] += bias[f0 + f];
      }
      round_row<Op>(from, width, rows + t * stride + f0);
    }
  }
}

// Two features' lanes to their row of an operand panel.
template <typename Op>
inline void store_pair(const Wide<Op>* low, const Wide<Op>* high, Op* operand, int64_t f) {
  if constexpr (sizeof(Op) == 2) {
    round_pairs(low, high, kPanel, words(operand) + f / 2 * kPanel);
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
    round_row<Op>(panel + f * kPanel, kPanel, rows + f * stride);
  }
}

template <typename Op>
void spread(const Op* operand, int64_t features, Op* rows, int64_t stride) {
  for (int64_t f = 0; f < features; f += sizeof(Op) == 2 ? 2 : 1) {
    auto* to = elements(rows + f * stride);
    fetch_to_write(rows + std::min(f + kFetched, features - 1) * stride, kPanel);
    if constexpr (sizeof(Op) == 2) {
      fetch_to_write(rows + std::min(f + kFetched + 1, features - 1) * stride, kPanel);
      const uint32_t* row = words(operand) + f / 2 * kPanel;
      SPECTRALX_LANES to[n] = static_cast<uint16_t>(row[n]);
      SPECTRALX_LANES to[stride + n] = static_cast<uint16_t>(row[n] >> 16);
    } else {
      std::copy_n(operand + f * kPanel, kPanel, to);
    }
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

// 32 columns of panels [rows][32] as one panel: row i of panels from `panels` on to `lanes`, 0 where there is
// no column.
template <typename T>
class Gathered {
 public:
  Gathered(const int64_t* columns, int64_t rows) {
    for (int64_t n = 0; n < kPanel; ++n) {
      there_[n] = columns[n] >= 0;
      const int64_t column = std::max<int64_t>(columns[n], 0);  // an empty lane reads a valid one
      offset_[n] = column / kPanel * rows * kPanel + column % kPanel;
    }
  }
  void row(const T* panels, int64_t i, T* lanes) const {
    panels += i * kPanel;
    SPECTRALX_LANES {
      const T value = panels[offset_[n]];
      lanes[n] = there_[n] ? value : T(0);
    }
  }

 private:
  int64_t offset_[kPanel];
  bool there_[kPanel];
};

#ifdef SPECTRALX_SHUFFLES
// Of values of 32 bits. Neighbouring columns come from few vectors, so a shuffle of each costs less than a
// gather.
template <typename T>
  requires(sizeof(T) == 4)
class Gathered<T> {
 public:
  Gathered(const int64_t* columns, int64_t rows) {
    for (int64_t n = 0; n < kPanel; ++n) {
      if (columns[n] < 0) continue;
      const int64_t from = columns[n] / kPanel * rows * kPanel + columns[n] % kPanel / 16 * 16;
      Half& half = halves_[n / 16];
      int64_t i = 0;
      while (i < half.count && half.from[i] != from) ++i;
      if (i == half.count) {
        half.from[half.count++] = from;
        half.lane[i] = Lanes{};
      }
      half.lane[i][n % 16] = static_cast<uint32_t>(columns[n] % 16);
      half.taken[i] |= static_cast<uint16_t>(1u << n % 16);
    }
  }
  void row(const T* panels, int64_t i, T* lanes) const {
    panels += i * kPanel;
    for (int64_t h = 0; h < 2; ++h) {
      const Half& half = halves_[h];
      __m512i sum = _mm512_setzero_si512();
      for (int64_t j = 0; j < half.count; ++j)
        sum = _mm512_mask_permutexvar_epi32(sum, half.taken[j], (__m512i)half.lane[j],
                                            _mm512_loadu_si512(panels + half.from[j]));
      _mm512_storeu_si512(lanes + 16 * h, sum);
    }
  }

 private:
  // Sixteen lanes: the vectors they come from, and which lane of one goes where.
  struct Half {
    int64_t count = 0, from[16];  // from: the vector's first lane
    Lanes lane[16];
    uint16_t taken[16] = {};  // bits
  };
  Half halves_[2];
};
#endif

template <typename Op>
void gather_operand(const Op* panels, const int64_t* columns, int64_t features, Op* operand) {
  if constexpr (sizeof(Op) == 2) {
    const Gathered<uint32_t> gathered(columns, features / 2);
    for (int64_t i = 0; i < features / 2; ++i)
      gathered.row(words(panels), i, words(operand) + i * kPanel);
  } else {
    const Gathered<Op> gathered(columns, features);
    for (int64_t i = 0; i < features; ++i) gathered.row(panels, i, operand + i * kPanel);
  }
}

template <typename Op>
void gather(const Wide<Op>* panels, const int64_t* columns, int64_t features, bool add,
            Wide<Op>* panel) {
  using W = Wide<Op>;
  const Gathered<W> gathered(columns, features);
  for (int64_t i = 0; i < features; ++i) {
    W* to = panel + i * kPanel;
    if (!add) {
      gathered.row(panels, i, to);
      continue;
    }
    W lanes[kPanel];
    gathered.row(panels, i, lanes);
    SPECTRALX_LANES to[n] += lanes[n];
  }
}

// Zeros to the rows of a right operand from `written` on to whole panels of tokens.
template <typename Op>
inline void clear_rows(int64_t written, int64_t tokens, Op* operand) {
  const int64_t all = (tokens + kPanel - 1) / kPanel * kPanel;
  std::memset(static_cast<void*>(operand + written * kBlock), 0, sizeof(Op) * (all - written) * kBlock);
}

// A right operand of rows as they are, as (x - mean) * rstd of their row, or times the weight of their
// column: what is not null.
template <typename Op>
inline void pack_rows(const Op* rows, int64_t tokens, int64_t stride, int64_t columns,
                      const Wide<Op>* mean, const Wide<Op>* rstd, const Wide<Op>* weight, Op* operand) {
  using W = Wide<Op>;
  if constexpr (sizeof(Op) == 2) {
    for (int64_t t = 0; t < tokens; t += 2) {
      fetch(rows + std::min(t + kFetched, tokens - 1) * stride, columns);
      fetch(rows + std::min(t + kFetched + 1, tokens - 1) * stride, columns);
      const bool paired = t + 1 < tokens;
      const auto *low = reinterpret_cast<const uint16_t*>(rows + t * stride),
                 *high = paired ? low + stride : low;
      uint32_t* to = words(operand) + t / 2 * kBlock;
      if (mean == nullptr && weight == nullptr) {
        const uint32_t kept = paired ? 0xffffffffu : 0xffffu;
#pragma omp simd
        for (int64_t n = 0; n < columns; ++n)
          to[n] = (static_cast<uint32_t>(low[n]) | static_cast<uint32_t>(high[n]) << 16) & kept;
      } else {
        // The partner that an odd last token lacks becomes 0.
        W first[kBlock], second[kBlock];
        if (weight != nullptr) {
#pragma omp simd
          for (int64_t n = 0; n < columns; ++n) {
            first[n] = from_bits(low[n]) * weight[n];
            second[n] = paired ? from_bits(high[n]) * weight[n] : W(0);
          }
        } else {
          const W m0 = mean[t], m1 = paired ? mean[t + 1] : W(0), s0 = rstd[t],
                  s1 = paired ? rstd[t + 1] : W(0);
#pragma omp simd
          for (int64_t n = 0; n < columns; ++n) {
            first[n] = (from_bits(low[n]) - m0) * s0;
            second[n] = paired ? (from_bits(high[n]) - m1) * s1 : W(0);
          }
        }
        round_pairs(first, second, columns, to);
      }
      std::fill(to + columns, to + kBlock, 0u);
    }
  } else {
    for (int64_t t = 0; t < tokens; ++t) {
      fetch(rows + std::min(t + kFetched, tokens - 1) * stride, columns);
      const Op* from = rows + t * stride;
      Op* to = operand + t * kBlock;
      if (weight != nullptr) {
#pragma omp simd
        for (int64_t n = 0; n < columns; ++n) to[n] = from[n] * weight[n];
      } else {
        const W center = mean ? mean[t] : W(0), scale = mean ? rstd[t] : W(1);
#pragma omp simd
        for (int64_t n = 0; n < columns; ++n) to[n] = (from[n] - center) * scale;
      }
      std::fill(to + columns, to + kBlock, Op(0));
    }
  }
  clear_rows(sizeof(Op) == 2 ? tokens + tokens % 2 : tokens, tokens, operand);
}

template <typename Op>
void pack_tokens(const Op* rows, int64_t tokens, int64_t stride, int64_t columns,
                 const Wide<Op>* mean, const Wide<Op>* rstd, Op* operand) {
  pack_rows<Op>(rows, tokens, stride, columns, mean, rstd, nullptr, operand);
}

template <typename Op>
void pack_wide(const Wide<Op>* rows, int64_t tokens, int64_t stride, int64_t columns, Op* operand) {
  using W = Wide<Op>;
  if constexpr (sizeof(Op) == 2) {
    static constexpr W kZeros[kBlock] = {};
    for (int64_t t = 0; t < tokens; t += 2) {
      fetch(rows + std::min(t + kFetched, tokens - 1) * stride, columns);
      fetch(rows + std::min(t + kFetched + 1, tokens - 1) * stride, columns);
      const W* low = rows + t * stride;
      uint32_t* to = words(operand) + t / 2 * kBlock;
      round_pairs(low, t + 1 < tokens ? low + stride : kZeros, columns, to);
      std::fill(to + columns, to + kBlock, 0u);
    }
    clear_rows(tokens + tokens % 2, tokens, operand);
  } else {
    pack_tokens<Op>(rows, tokens, stride, columns, nullptr, nullptr, operand);
  }
}

template <typename Op>
void pack_scaled(const Op* rows, int64_t tokens, int64_t stride, int64_t columns,
                 const Wide<Op>* weight, Op* operand) {
  pack_rows<Op>(rows, tokens, stride, columns, nullptr, nullptr, weight, operand);
}

}  // namespace
