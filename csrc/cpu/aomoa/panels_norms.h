// Norms, and sums along features or lanes.
// A part of panels_impl.h.
#pragma once

namespace {

// Sums over features are taken in blocks, which keeps their round-off near that of a tree.
constexpr int64_t kSumBlock = 32;

typedef float Floats __attribute__((vector_size(64)));  // sixteen lanes

// Adds x, or the square of its distance from center.
template <bool kSquares, typename V>
inline void add_term(const V& x, const V& center, V& sum) {
  if constexpr (kSquares) {
    sum += (x - center) * (x - center);
  } else {
    sum += x;
  }
}

// sums [32] over the features of those terms, in blocks; center [32].
template <bool kSquares, typename Op>
inline void sum_features(const Op* panel, int64_t features, const Wide<Op>* center, Wide<Op>* sums) {
  using W = Wide<Op>;
  if constexpr (sizeof(W) == 4) {
    Floats total[2] = {}, middle[2];
    std::memcpy(middle, center, sizeof middle);
    for (int64_t f0 = 0; f0 < features; f0 += kSumBlock) {
      const int64_t end = std::min(f0 + kSumBlock, features);
      Floats part[2] = {};
      for (int64_t f = f0; f < end; f += sizeof(Op) == 2 ? 2 : 1) {
        Lanes row[2];
        std::memcpy(row, panel + f * kPanel, sizeof row);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          if constexpr (sizeof(Op) == 2) {
            add_term<kSquares>((Floats)(row[h] << 16), middle[h], part[h]);
            add_term<kSquares>((Floats)(row[h] & 0xffff0000u), middle[h], part[h]);
          } else {
            add_term<kSquares>((Floats)row[h], middle[h], part[h]);
          }
        }
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) total[h] += part[h];
    }
    std::memcpy(sums, total, sizeof total);
  } else {
    std::fill_n(sums, kPanel, W(0));
    for (int64_t f0 = 0; f0 < features; f0 += kSumBlock) {
      W part[kPanel] = {};
      for (int64_t f = f0; f < std::min(f0 + kSumBlock, features); ++f) {
        SPECTRALX_LANES add_term<kSquares>(panel[f * kPanel + n], center[n], part[n]);
      }
      SPECTRALX_LANES sums[n] += part[n];
    }
  }
}

template <typename Op>
void moments(const Op* panel, int64_t features, Wide<Op> eps, Wide<Op>* mean, Wide<Op>* rstd) {
  using W = Wide<Op>;
  W sums[kPanel] = {};
  sum_features<false>(panel, features, sums, sums);
  SPECTRALX_LANES mean[n] = sums[n] / static_cast<W>(features);
  sum_features<true>(panel, features, mean, sums);
  SPECTRALX_LANES rstd[n] = W(1) / std::sqrt(sums[n] / static_cast<W>(features) + eps);
}

template <typename Op>
void normalise(const Op* panel, int64_t features, const Wide<Op>* mean, const Wide<Op>* rstd,
               const Wide<Op>* weight, const Wide<Op>* bias, Op* out) {
  using W = Wide<Op>;
  W before[kPanel];
  for_features<Op>(panel, features, [&](int64_t f, const W* row) {
    const W scale = weight[f], shift = bias[f];
    if constexpr (sizeof(Op) == 2) {
      W value[kPanel];
      SPECTRALX_LANES value[n] = (row[n] - mean[n]) * rstd[n] * scale + shift;
      if (f % 2 == 0) {
        SPECTRALX_LANES before[n] = value[n];
      } else {
        store_pair<Op>(before, value, out, f - 1);
      }
    } else {
      W* to = out + f * kPanel;
      SPECTRALX_LANES to[n] = (row[n] - mean[n]) * rstd[n] * scale + shift;
    }
  });
}

template <typename Op>
void norm(Wide<Op>* x, int64_t features, Wide<Op> eps, Wide<Op>* rstd) {
  using W = Wide<Op>;
  W mean[kPanel];
  if constexpr (std::is_same_v<Op, W>) {
    moments<Op>(x, features, eps, mean, rstd);
  } else {
    moments<W>(x, features, eps, mean, rstd);
  }
  for (int64_t f = 0; f < features; ++f) {
    W* row = x + f * kPanel;
    SPECTRALX_LANES row[n] = (row[n] - mean[n]) * rstd[n];
  }
}

template <typename Op>
void affine(const Wide<Op>* normed, int64_t features, const Wide<Op>* weight,
            const Wide<Op>* bias, Wide<Op>* z) {
  using W = Wide<Op>;
  for (int64_t f = 0; f < features; ++f) {
    const W* row = normed + f * kPanel;
    W* to = z + f * kPanel;
    const W scale = weight[f], shift = bias[f];
    SPECTRALX_LANES to[n] = value_of(rounded<Op>(row[n] * scale + shift));
  }
}

// A fixed tree, the same on every instruction set.
template <int64_t kCount, typename W>
inline W sum_of(const W* values) {
  W part[kCount / 2];
  for (int64_t n = 0; n < kCount / 2; ++n) part[n] = values[n] + values[n + kCount / 2];
  for (int64_t width = kCount / 4; width > 0; width /= 2) {
    for (int64_t n = 0; n < width; ++n) part[n] += part[n + width];
  }
  return part[0];
}

// sums[f] += the sum of the lanes of feature f. Sixteen features at a time the tree is climbed by all of
// them at once: after a transposition its nodes are vectors.
template <typename W>
inline void add_lanes(const W* panel, int64_t features, W* sums) {
  int64_t f = 0;
  if constexpr (sizeof(W) == 4) {
    for (; f + 16 <= features; f += 16) {
      Lanes rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        Floats low, high;
        std::memcpy(&low, panel + (f + i) * kPanel, 64);
        std::memcpy(&high, panel + (f + i) * kPanel + 16, 64);
        rows[i] = (Lanes)(low + high);
      }
      turn(rows);
      Floats part[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) part[i] = (Floats)rows[i];
#pragma GCC unroll 4
      for (int width = 8; width > 0; width /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
      }
      Floats sum;
      std::memcpy(&sum, sums + f, 64);
      sum += part[0];
      std::memcpy(sums + f, &sum, 64);
    }
  }
  for (; f < features; ++f) sums[f] += sum_of<kPanel>(panel + f * kPanel);
}

template <typename Op>
void norm_backward(Wide<Op>* dz, const Wide<Op>* normed, int64_t features, const Wide<Op>* rstd,
                   const Wide<Op>* weight, Wide<Op>* dweight, Wide<Op>* dbias) {
  using W = Wide<Op>;
  W sum[kPanel] = {}, along[kPanel] = {}, products[16 * kPanel];
  add_lanes(dz, features, dbias);
  for (int64_t f0 = 0; f0 < features; f0 += 16) {
    const int64_t count = std::min<int64_t>(16, features - f0);
    for (int64_t i = 0; i < count; ++i) {
      W *g = dz + (f0 + i) * kPanel, *product = products + i * kPanel;
      const W* x = normed + (f0 + i) * kPanel;
      const W scale = weight[f0 + i];
      SPECTRALX_LANES {
        product[n] = g[n] * x[n];
        g[n] *= scale;
        sum[n] += g[n];
        along[n] += product[n] * scale;
      }
    }
    add_lanes(products, count, dweight + f0);
  }
  SPECTRALX_LANES sum[n] /= static_cast<W>(features);
  SPECTRALX_LANES along[n] /= static_cast<W>(features);
  for (int64_t f = 0; f < features; ++f) {
    W* g = dz + f * kPanel;
    const W* x = normed + f * kPanel;
    SPECTRALX_LANES g[n] = rstd[n] * (g[n] - sum[n] - x[n] * along[n]);
  }
}

template <typename Op>
void add_sums(const Wide<Op>* panel, int64_t features, Wide<Op>* sums) {
  add_lanes(panel, features, sums);
}

template <typename Op>
void add_operand_sums(const Op* operand, int64_t features, Wide<Op>* sums) {
  constexpr int64_t kCount = 16;  // which add_lanes takes at once
  Wide<Op> wide[kCount * kPanel];
  for (int64_t f = 0; f < features; f += kCount) {
    const int64_t count = std::min(kCount, features - f);
    widen<Op>(operand + f * kPanel, count, wide);
    add_lanes(wide, count, sums + f);
  }
}

template <typename Op>
void scale_features(Wide<Op>* panel, int64_t features, const Wide<Op>* weight) {
  for (int64_t f = 0; f < features; ++f) {
    Wide<Op>* row = panel + f * kPanel;
    const Wide<Op> scale = weight[f];
    SPECTRALX_LANES row[n] *= scale;
  }
}

template <typename Op>
void scale_tokens(const Wide<Op>* panel, int64_t features, const Wide<Op>* weight,
                  Wide<Op>* out) {
  for (int64_t f = 0; f < features; ++f) {
    SPECTRALX_LANES out[f * kPanel + n] = panel[f * kPanel + n] * weight[n];
  }
}

template <typename Op>
void dot_weight(const Wide<Op>* panel, int64_t features, const Wide<Op>* weight,
                Wide<Op>* sums) {
  using W = Wide<Op>;
  SPECTRALX_LANES sums[n] = W(0);
  for (int64_t f = 0; f < features; ++f) {
    const W scale = weight[f];
    SPECTRALX_LANES sums[n] += panel[f * kPanel + n] * scale;
  }
}

template <typename Op>
void dot_panel(const Wide<Op>* panel, int64_t features, const Wide<Op>* other, Wide<Op>* sums) {
  using W = Wide<Op>;
  SPECTRALX_LANES sums[n] = W(0);
  for (int64_t f = 0; f < features; ++f) {
    SPECTRALX_LANES sums[n] += panel[f * kPanel + n] * other[f * kPanel + n];
  }
}

}  // namespace
