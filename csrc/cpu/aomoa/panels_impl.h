// The panel kernels of panels.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another. Sums run over
// features in a fixed order, in all lanes at once: bits repeat.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/aomoa/panels.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/exponential.h"
#include "cpu/common/operands.h"

namespace {

using spectralx::cpu::kBlock;
using spectralx::cpu::kLogEpsilon;
using spectralx::cpu::kPanel;
using spectralx::cpu::PanelKernels;
using spectralx::cpu::Wide;

#define SPECTRALX_LANES _Pragma("omp simd") for (int64_t n = 0; n < kPanel; ++n)

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

// Sums over features are taken in blocks, which keeps their round-off near that of a tree.
constexpr int64_t kSumBlock = 32;

template <typename Op>
void moments(const Op* panel, int64_t features, Wide<Op> eps, Wide<Op>* mean, Wide<Op>* rstd) {
  using W = Wide<Op>;
  W total[kPanel] = {}, part[kPanel] = {};
  const auto fold = [&](int64_t f) {
    if (f % kSumBlock != kSumBlock - 1 && f != features - 1) return;
    SPECTRALX_LANES total[n] += part[n];
    SPECTRALX_LANES part[n] = W(0);
  };
  for_features<Op>(panel, features, [&](int64_t f, const W* row) {
    SPECTRALX_LANES part[n] += row[n];
    fold(f);
  });
  SPECTRALX_LANES mean[n] = total[n] / static_cast<W>(features);
  SPECTRALX_LANES total[n] = W(0);
  for_features<Op>(panel, features, [&](int64_t f, const W* row) {
    SPECTRALX_LANES part[n] += (row[n] - mean[n]) * (row[n] - mean[n]);
    fold(f);
  });
  SPECTRALX_LANES rstd[n] = W(1) / std::sqrt(total[n] / static_cast<W>(features) + eps);
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
template <typename W>
inline W sum_of_lanes(const W* lanes) {
  W part[kPanel / 2];
  for (int64_t n = 0; n < kPanel / 2; ++n) part[n] = lanes[n] + lanes[n + kPanel / 2];
  for (int64_t width = kPanel / 4; width > 0; width /= 2) {
    for (int64_t n = 0; n < width; ++n) part[n] += part[n + width];
  }
  return part[0];
}

template <typename Op>
void norm_backward(Wide<Op>* dz, const Wide<Op>* normed, int64_t features, const Wide<Op>* rstd,
                   const Wide<Op>* weight, Wide<Op>* dweight, Wide<Op>* dbias) {
  using W = Wide<Op>;
  W sum[kPanel] = {}, along[kPanel] = {};
  for (int64_t f = 0; f < features; ++f) {
    W* g = dz + f * kPanel;
    const W* x = normed + f * kPanel;
    const W scale = weight[f];
    W product[kPanel];
    SPECTRALX_LANES product[n] = g[n] * x[n];
    dweight[f] += sum_of_lanes(product);
    dbias[f] += sum_of_lanes(g);
    SPECTRALX_LANES g[n] *= scale;
    SPECTRALX_LANES sum[n] += g[n];
    SPECTRALX_LANES along[n] += product[n] * scale;
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
    dbias[f] += sum_of_lanes(row);
  }
}

// use(row, lanes) for every row of the gathered panel. The lane of an empty column reads a valid one.
template <typename T, typename Use>
inline void gather_rows(const T* panels, const int64_t* columns, int64_t rows, Use use) {
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

// The taken terms of 32 tokens, slot by slot: the n-th expert a token takes, in order.
constexpr int64_t kSlots = 4;  // more are taken without slots

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
    W* out = c + i * kPanel;
    SPECTRALX_LANES {
      const W value = peak[n] + logarithm(total[n]);
      out[n] = total[n] == W(0) ? static_cast<W>(kLogEpsilon) : value;
    }
  }
}

template <typename Op>
void combine_backward(Wide<Op>* y, int64_t experts, int64_t r, const Wide<Op>* gates,
                      const Wide<Op>* c, const Wide<Op>* dc, Wide<Op>* dgates,
                      Wide<Op>* dbias) {
  using W = Wide<Op>;
  for (int64_t e = 0; e < experts; ++e) {
    const W* gate = gates + e * kPanel;
    W* dgate = dgates + e * kPanel;
    W along[kPanel] = {};
    for (int64_t i = 0; i < r; ++i) {
      W* row = y + (e * r + i) * kPanel;
      const W *combined = c + i * kPanel, *grad = dc + i * kPanel;
      SPECTRALX_LANES {
        const W per_gate = grad[n] * exponential(row[n] - combined[n]);
        along[n] += gate[n] != W(0) ? per_gate : W(0);
        row[n] = gate[n] != W(0) ? gate[n] * per_gate : W(0);
      }
      if (dbias) dbias[e * r + i] += sum_of_lanes(row);
    }
    SPECTRALX_LANES dgate[n] = along[n];
  }
}

template <typename Op>
void pack_tokens(const Op* rows, int64_t tokens, int64_t stride, int64_t columns,
                 const Wide<Op>* mean, const Wide<Op>* rstd, Op* operand) {
  using W = Wide<Op>;
  if constexpr (sizeof(Op) == 2) {
    for (int64_t t = 0; t < tokens; t += 2) {
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

template <typename Op>
void add_sums(const Wide<Op>* panel, int64_t features, Wide<Op>* sums) {
  for (int64_t f = 0; f < features; ++f) sums[f] += sum_of_lanes(panel + f * kPanel);
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

template <typename Op>
void fold(const Op* row, int64_t width, const Wide<Op>* gamma, const Wide<Op>* beta, Op* folded,
          Wide<Op>* sum, Wide<Op>* shift) {
  using W = Wide<Op>;
  const auto* from = elements(row);
  auto* to = elements(folded);
  W total = 0, moved = 0;
#pragma omp simd reduction(+ : total, moved)
  for (int64_t i = 0; i < width; ++i) {
    const W weight = value_of(from[i]);
    const auto product = rounded<Op>(gamma[i] * weight);
    to[i] = product;
    total += value_of(product);  // of what the product will use
    moved += beta[i] * weight;
  }
  *sum = total;
  *shift = moved;
}

template <typename Op>
void finish_down(const Op* down, const Wide<Op>* products, int64_t r, int64_t columns,
                 int64_t stride, const Wide<Op>* gamma, const Wide<Op>* beta,
                 const Wide<Op>* z0_sums, Op* down_grad, Wide<Op>* gamma_grad,
                 Wide<Op>* beta_grad) {
  using W = Wide<Op>;
  std::fill(gamma_grad, gamma_grad + columns, W(0));
  std::fill(beta_grad, beta_grad + columns, W(0));
  for (int64_t j = 0; j < r; ++j) {
    const auto* weight = elements(down + j * stride);
    const W* product = products + j * kBlock;
    auto* grad = elements(down_grad + j * stride);
    const W sum = z0_sums[j];
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      const W w = value_of(weight[i]);
      gamma_grad[i] += w * product[i];
      beta_grad[i] += w * sum;
      grad[i] = rounded<Op>(product[i] * gamma[i] + sum * beta[i]);
    }
  }
}

template <typename Op>
void add_columns(const Wide<Op>* rows, int64_t r, int64_t count, const Wide<Op>* weight,
                 Wide<Op>* panel, Wide<Op>* sum) {
  for (int64_t i = 0; i < r; ++i) {
    const Wide<Op>* from = rows + i * kBlock;
    Wide<Op>*to = panel + i * kPanel, *total = sum + i * kPanel;
    std::fill(to + count, to + kPanel, Wide<Op>(0));
#pragma omp simd
    for (int64_t n = 0; n < count; ++n) {
      to[n] = from[n];
      total[n] += weight[n] * from[n];
    }
  }
}

template <typename Op>
void finish_input(const Wide<Op>* product, int64_t tokens, int64_t columns, const Op* x,
                  const Wide<Op>* mean, const Wide<Op>* offset, const Wide<Op>* slope, Op* dx,
                  int64_t stride) {
  using W = Wide<Op>;
  for (int64_t t = 0; t < tokens; ++t) {
    const W* from = product + t * kBlock;
    const W m = mean[t], o = offset[t], s = slope[t];
    const auto* in = elements(x + t * stride);
    auto* to = elements(dx + t * stride);
#pragma omp simd
    for (int64_t n = 0; n < columns; ++n)
      to[n] = rounded<Op>(from[n] - o - (value_of(in[n]) - m) * s);
  }
}

template <typename Op>
constexpr PanelKernels<Op> table(const char* name) {
  return {name,
          pack<Op>,
          transpose<Op>,
          unpack<Op>,
          unpack_wide<Op>,
          widen<Op>,
          to_operand<Op>,
          to_features<Op>,
          to_tokens<Op>,
          moments<Op>,
          normalise<Op>,
          norm<Op>,
          affine<Op>,
          norm_backward<Op>,
          bias_relu<Op>,
          relu_backward<Op>,
          gather_operand<Op>,
          gather<Op>,
          combine<Op>,
          combine_backward<Op>,
          pack_tokens<Op>,
          add_sums<Op>,
          scale_features<Op>,
          scale_tokens<Op>,
          dot_weight<Op>,
          dot_panel<Op>,
          fold<Op>,
          finish_down<Op>,
          add_columns<Op>,
          finish_input<Op>};
}

}  // namespace

SPECTRALX_END_TARGET
