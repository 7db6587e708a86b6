// The kernels of kernels.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another. A query's sums
// run over the keys in a fixed order, in its own lane: bits repeat, and equal queries stay equal.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/refine/kernels.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/exponential.h"
#include "cpu/common/operands.h"

namespace {

using spectralx::cpu::kLanes;
using spectralx::cpu::RefineKernels;

#define SPECTRALX_LANES _Pragma("omp simd") for (int64_t n = 0; n < kLanes; ++n)

constexpr int64_t kSumKeys = 64;  // exponentials summed before their sum is added to the whole

// inline, for the instruction set of this file
template <typename T>
inline bool infinite(T x) {
  return x - x != x - x && x == x;
}

template <typename Op>
void add_keys(const Wide<Op>* scores, int64_t keys, int64_t lanes, Wide<Op> scale,
              Wide<Op>* largest, Wide<Op>* sum) {
  using W = Wide<Op>;
  for (int64_t v = 0; v < lanes; v += kLanes) {
    alignas(64) W top[kLanes], base[kLanes], total[kLanes], part[kLanes];
    SPECTRALX_LANES top[n] = largest[v + n];
    for (int64_t j = 0; j < keys; ++j) {
      const W* s = scores + j * kPanel + v;
      SPECTRALX_LANES {
        const W value = s[n] * scale;
        top[n] = value > top[n] ? value : top[n];
      }
    }
    for (int64_t n = 0; n < kLanes; ++n) {
      const W before = largest[v + n];
      base[n] = infinite(top[n]) ? W(0) : top[n];
      // What was summed so far was under another base, or nothing but exp(-infinity).
      const W moved = before == -std::numeric_limits<W>::infinity()
                          ? W(0)
                          : exponential((infinite(before) ? W(0) : before) - base[n]);
      total[n] = sum[v + n] * moved;
      largest[v + n] = top[n];
    }
    for (int64_t begin = 0; begin < keys; begin += kSumKeys) {
      SPECTRALX_LANES part[n] = W(0);
      for (int64_t j = begin; j < std::min(begin + kSumKeys, keys); ++j) {
        const W* s = scores + j * kPanel + v;
        SPECTRALX_LANES part[n] += exponential(s[n] * scale - base[n]);
      }
      SPECTRALX_LANES total[n] += part[n];
    }
    SPECTRALX_LANES sum[v + n] = total[n];
  }
}

template <typename Op>
void choose(const Wide<Op>* scores, int64_t keys, Wide<Op> scale, const Wide<Op>* log_sum,
            int64_t first, int64_t live, Wide<Op>* best, int32_t* index) {
  using W = Wide<Op>;
  for (int64_t v = 0; v < live; v += kLanes) {
    const auto query = static_cast<int32_t>(first + v);
    const auto here = static_cast<int32_t>(live - v);
    alignas(64) W offset[kLanes];
    SPECTRALX_LANES offset[n] = log_sum[v + n];
    for (int64_t j = 0; j < keys; ++j) {
      const W* s = scores + j * kPanel + v;
      W* top = best + j * kLanes;
      int32_t* at = index + j * kLanes;
#pragma omp simd
      for (int32_t n = 0; n < kLanes; ++n) {
        const W value = s[n] * scale - offset[n], held = top[n];
        // Larger, or the first NaN.
        const bool better = (n < here) & !(value <= held) & (held == held);
        at[n] = better ? query + n : at[n];
        top[n] = better ? value : held;
      }
    }
  }
}

template <typename Op>
void reduce(const Wide<Op>* best, const int32_t* index, int64_t keys, Wide<Op>* value,
            int64_t* match) {
  using W = Wide<Op>;
  for (int64_t j = 0; j < keys; ++j) {
    const W* top = best + j * kLanes;
    const int32_t* at = index + j * kLanes;
    int64_t lane = 0;
    for (int64_t n = 1; n < kLanes; ++n) {
      const W a = top[n], b = top[lane];  // comes_before, for the instruction set of this file
      const bool nan = a != a, held_nan = b != b, lower = at[n] < at[lane];
      const bool before = (nan & (!held_nan | lower)) | (!nan & !held_nan & ((a > b) | ((a == b) & lower)));
      lane = before ? n : lane;
    }
    match[j] = at[lane];
    if (value != nullptr) value[j] = top[lane];
  }
}

template <typename W>
struct Moments {
  W mean, rstd;
};

template <typename Op>
inline Moments<Wide<Op>> moments(const Op* x, int64_t width, Wide<Op> eps) {
  using W = Wide<Op>;
  const auto* from = elements(x);
  W sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += value_of(from[i]);
  const W mean = sum / static_cast<W>(width);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) {
    const W centred = value_of(from[i]) - mean;
    squares += centred * centred;
  }
  return {mean, W(1) / std::sqrt(squares / static_cast<W>(width) + eps)};
}

template <typename Op>
void normalise(const Op* x, int64_t width, Wide<Op> eps, const Wide<Op>* weight,
               const Wide<Op>* bias, Op* out) {
  const auto [mean, rstd] = moments<Op>(x, width, eps);
  const Wide<Op> m = mean, r = rstd;
  const auto* from = elements(x);
  auto* to = elements(out);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    to[i] = rounded<Op>((value_of(from[i]) - m) * r * weight[i] + bias[i]);
  }
}

template <typename Op>
void normalise_backward(const Op* x, const Wide<Op>* grad, int64_t width, Wide<Op> eps,
                        const Wide<Op>* weight, Op* dx, Wide<Op>* dweight, Wide<Op>* dbias) {
  using W = Wide<Op>;
  const auto [mean, rstd] = moments<Op>(x, width, eps);
  const W m = mean, r = rstd;
  const auto* from = elements(x);
  W sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (int64_t i = 0; i < width; ++i) {
    const W normed = (value_of(from[i]) - m) * r;
    dweight[i] += grad[i] * normed;
    dbias[i] += grad[i];
    sum += grad[i] * weight[i];
    along += grad[i] * weight[i] * normed;
  }
  if (dx == nullptr) return;
  sum /= static_cast<W>(width);
  along /= static_cast<W>(width);
  auto* to = elements(dx);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const W normed = (value_of(from[i]) - m) * r;
    to[i] = rounded<Op>(r * (grad[i] * weight[i] - sum - normed * along));
  }
}

template <typename Op>
void add(const Op* from, int64_t width, Wide<Op>* to) {
  const auto* values = elements(from);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) to[i] += value_of(values[i]);
}

template <typename Op>
void add_wide(const Wide<Op>* from, int64_t width, Wide<Op>* to) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) to[i] += from[i];
}

template <typename Op>
void weigh(const Op* x, int64_t width, Wide<Op> factor, Op* out) {
  using W = Wide<Op>;
  const auto* from = elements(x);
  auto* to = elements(out);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const W value = value_of(from[i]);
    to[i] = rounded<Op>(value + factor * value);
  }
}

template <typename Op>
Wide<Op> weigh_backward(const Op* x, const Op* grad, int64_t width, Wide<Op> factor, Op* dx) {
  using W = Wide<Op>;
  const auto *from = elements(x), *upstream = elements(grad);
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += value_of(upstream[i]) * value_of(from[i]);
  if (dx != nullptr) weigh<Op>(grad, width, factor, dx);
  return sum;
}

template <typename Op>
constexpr RefineKernels<Op> table(const char* name) {
  return {name,
          pack<Op>,
          add_keys<Op>,
          choose<Op>,
          reduce<Op>,
          normalise<Op>,
          normalise_backward<Op>,
          add<Op>,
          add_wide<Op>,
          narrow<Op>,
          weigh<Op>,
          weigh_backward<Op>};
}

}  // namespace

SPECTRALX_END_TARGET
