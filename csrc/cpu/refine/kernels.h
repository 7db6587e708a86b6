// What the Are-adapter's operators do between their products on the CPU: scores of a panel of 32
// queries, and rows of tokens.
//
// W is the type sums are formed in, Op the storage type: float, double or, where the processor
// multiplies it, bfloat16. All functions work on the calling thread. They are compiled once for each
// instruction set (kernels_*.cpp) and chosen at run time.
#pragma once

#include <cstdint>

#include "cpu/common/product.h"
#include "cpu/instruction_sets.h"

namespace spectralx::cpu {

constexpr int64_t kLanes = 16;  // queries that are compared at once

template <typename Op>
struct RefineKernels {
  using W = Wide<Op>;
  const char* instruction_set;

  // rows [n][stride] of `features` each, n <= 32, to the right operand of a product.
  void (*pack)(const Op* rows, int64_t n, int64_t stride, int64_t features, Op* panel);

  // scores [keys][32] of a panel's queries times `scale`. Running over calls, one a query: the
  // largest score, and the sum of exp(score - largest), of 0 for an infinite largest. `lanes` 16, 32.
  void (*add_keys)(const W* scores, int64_t keys, int64_t lanes, W scale, W* largest, W* sum);
  // best and index [keys][16]: the largest score - log_sum [32] of the queries that meet in a lane,
  // and their number; `first` is that of the panel's first, `live` how many it has.
  void (*choose)(const W* scores, int64_t keys, W scale, const W* log_sum, int64_t first,
                 int64_t live, W* best, int32_t* index);
  // Over the 16 lanes, for each key: value (null: not wanted) and query.
  void (*reduce)(const W* best, const int32_t* index, int64_t keys, W* value, int64_t* match);

  // out [width] = layer norm of the row x.
  void (*normalise)(const Op* x, int64_t width, W eps, const W* weight, const W* bias, Op* out);
  // Its gradient: dx, null if not wanted; adds to dweight and dbias.
  void (*normalise_backward)(const Op* x, const W* grad, int64_t width, W eps, const W* weight,
                             Op* dx, W* dweight, W* dbias);
  // to [width] += from
  void (*add)(const Op* from, int64_t width, W* to);
  void (*add_wide)(const W* from, int64_t width, W* to);
  // to [width] = from
  void (*narrow)(const W* from, int64_t width, Op* to);
  // out [width] = x + factor * x
  void (*weigh)(const Op* x, int64_t width, W factor, Op* out);
  // dx [width] = grad + factor * grad unless null; returns the sum of grad * x.
  W (*weigh_backward)(const Op* x, const Op* grad, int64_t width, W factor, Op* dx);
};

// The best table this processor runs; for bfloat16 only where `multiplies_bfloat16`.
template <typename Op>
const RefineKernels<Op>& refine_kernels() {
  return best_product_table<RefineKernels<Op>, Op>();
}

// Whether (value, query) comes before the best so far: larger, or the lower of equal ones; a NaN
// counts as the largest.
template <typename W>
inline bool comes_before(W value, int64_t query, W best, int64_t best_query) {
  const bool nan = value != value, best_nan = best != best;
  if (nan || best_nan) return nan && (!best_nan || query < best_query);
  return value > best || (value == best && query < best_query);
}

}  // namespace spectralx::cpu
