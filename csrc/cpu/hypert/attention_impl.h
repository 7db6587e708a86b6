// The kernels of attention.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another. Sums over keys
// run in a fixed order, in all lanes at once: bits repeat.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include <c10/util/BFloat16.h>

#include "cpu/common/product.h"
#include "cpu/hypert/attention.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/exponential.h"
#include "cpu/common/operands.h"
#include "cpu/common/transposition.h"

namespace {

using spectralx::cpu::AttentionKernels;
using spectralx::cpu::kPanel;
using spectralx::cpu::padded_depth;
using spectralx::cpu::Wide;

#define SPECTRALX_LANES _Pragma("omp simd") for (int64_t n = 0; n < kPanel; ++n)

// Row `key` of 32 values to an operand panel, whose rows are paired for bfloat16.
template <typename Op>
inline void store_row(const Wide<Op>* values, int64_t key, Op* operand) {
  if constexpr (sizeof(Op) == 2) {
    uint16_t* to = elements(operand) + key / 2 * 2 * kPanel + key % 2;
    SPECTRALX_LANES to[2 * n] = rounded<Op>(values[n]);
  } else {
    SPECTRALX_LANES operand[key * kPanel + n] = values[n];
  }
}

template <typename Op>
inline void store_plain(const Wide<Op>* values, int64_t key, Op* rows) {
  auto* to = elements(rows) + key * kPanel;
  SPECTRALX_LANES to[n] = rounded<Op>(values[n]);
}

// Rows of an operand panel past the last key.
template <typename Op>
inline void zero_rows(int64_t keys, Op* operand) {
  const Wide<Op> zeros[kPanel] = {};
  for (int64_t key = keys; key < padded_depth<Op>(keys); ++key) store_row<Op>(zeros, key, operand);
}

// The largest scaled score of each lane; NaN is left to the exponentials.
template <typename W>
inline void largest_of(const W* scores, int64_t keys, W scale, W* largest) {
  SPECTRALX_LANES largest[n] = -std::numeric_limits<W>::infinity();
  for (int64_t key = 0; key < keys; ++key) {
    const W* row = scores + key * kPanel;
    SPECTRALX_LANES largest[n] = row[n] > largest[n] ? row[n] : largest[n];
  }
  SPECTRALX_LANES largest[n] *= scale;
}

constexpr int64_t kSumBlock = 32;  // keys summed before they join the total: round-off of a tree

// scores become exponentials; their sums.
template <typename W, typename Use>
inline void exponentials(W* scores, int64_t keys, W scale, W copies, W* sums, Use use) {
  W largest[kPanel], part[kPanel] = {};
  largest_of(scores, keys, scale, largest);
  SPECTRALX_LANES sums[n] = W(0);
  for (int64_t key = 0; key < keys; ++key) {
    W* row = scores + key * kPanel;
    const W times = key == keys - 1 ? copies : W(1);
    SPECTRALX_LANES row[n] = times * exponential(row[n] * scale - largest[n]);
    SPECTRALX_LANES part[n] += row[n];
    use(key, row);
    if (key % kSumBlock == kSumBlock - 1 || key == keys - 1) {
      SPECTRALX_LANES sums[n] += part[n];
      SPECTRALX_LANES part[n] = W(0);
    }
  }
}

template <typename Op>
void softmax(Wide<Op>* scores, int64_t keys, Wide<Op> scale, Wide<Op> copies, Op* operand,
             Wide<Op>* sums) {
  using W = Wide<Op>;
  exponentials<W>(scores, keys, scale, copies, sums,
                  [&](int64_t key, const W* row) { store_row<Op>(row, key, operand); });
  zero_rows<Op>(keys, operand);
}

template <typename Op>
void softmax_backward(Wide<Op>* scores, Wide<Op>* dp, int64_t keys, int64_t count, Wide<Op> scale,
                      Wide<Op> copies, Op* p, Op* ds, Op* ds_operand) {
  using W = Wide<Op>;
  W sums[kPanel], along[kPanel] = {}, part[kPanel] = {};
  exponentials<W>(scores, keys, scale, copies, sums, [&](int64_t key, const W* row) {
    const W* grad = dp + key * kPanel;
    SPECTRALX_LANES part[n] += row[n] * grad[n];
    if (key % kSumBlock == kSumBlock - 1 || key == keys - 1) {
      SPECTRALX_LANES along[n] += part[n];
      SPECTRALX_LANES part[n] = W(0);
    }
  });
  W inverse[kPanel], slope[kPanel];
  SPECTRALX_LANES inverse[n] = W(1) / sums[n];
  SPECTRALX_LANES along[n] *= inverse[n];
  // Lanes without a query are set to zero, whatever stands there.
  SPECTRALX_LANES slope[n] = n < count ? scale : W(0);
  for (int64_t key = 0; key < keys; ++key) {
    W* row = scores + key * kPanel;
    W* grad = dp + key * kPanel;
    SPECTRALX_LANES row[n] = n < count ? row[n] * inverse[n] : W(0);
    SPECTRALX_LANES grad[n] = slope[n] == W(0) ? W(0) : row[n] * (grad[n] - along[n]) * slope[n];
    store_plain<Op>(row, key, p);
    store_plain<Op>(grad, key, ds);
    store_row<Op>(grad, key, ds_operand);
  }
  zero_rows<Op>(keys, ds_operand);
}

template <typename Op>
void pair_rows(const Op* rows, int64_t columns, Op* operand) {
  if constexpr (sizeof(Op) == 2) {
    for (int64_t r = 0; r < kPanel; r += 2) {
      const uint16_t* low = reinterpret_cast<const uint16_t*>(rows + r * columns);
      const uint16_t* high = low + columns;
      uint32_t* to = reinterpret_cast<uint32_t*>(operand + r * columns);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) to[c] = low[c] | static_cast<uint32_t>(high[c]) << 16;
    }
  } else {
    std::copy(rows, rows + kPanel * columns, operand);
  }
}

template <typename Op>
constexpr AttentionKernels<Op> table(const char* name) {
  return {name,          softmax<Op>,   softmax_backward<Op>,
          transpose<Op>, pair_rows<Op>, narrow<Op>};
}

}  // namespace

SPECTRALX_END_TARGET
