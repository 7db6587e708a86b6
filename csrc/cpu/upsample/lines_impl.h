// The kernels of lines.h, compiled for whatever instruction set the including file has chosen.
// Internal linkage throughout, so that no copy for one instruction set serves another.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/upsample/lines.h"

// After the headers: their inline functions keep the portable instruction set.
SPECTRALX_BEGIN_TARGET

#include "cpu/common/storage.h"
#include "cpu/common/transposition.h"

namespace {

using c10::BFloat16;
using spectralx::cpu::LineKernels;

// out [count] (+)= sum of N terms; N known, so that each element is read and written once.
template <int N, bool kAdd, typename S, typename A, typename O>
inline void sum_of(const S* const* sources, const A* weights, int64_t offset, int64_t count,
                   O* out) {
  const S* from[N];
  A weight[N];
  for (int n = 0; n < N; ++n) {
    from[n] = sources[n] + offset;
    weight[n] = weights[n];
  }
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    A sum = kAdd ? widen(out[k]) : A(0);
    for (int n = 0; n < N; ++n) sum += weight[n] * widen(from[n][k]);
    store(sum, out[k]);
  }
}

constexpr int64_t kTerms = 6;  // terms of one pass: two lines a tap of a 3 x 3 kernel

template <bool kAdd, typename S, typename A, typename O>
inline void sum_of_few(const S* const* sources, const A* weights, int64_t n, int64_t offset,
                       int64_t count, O* out) {
  switch (n) {
    case 1: return sum_of<1, kAdd>(sources, weights, offset, count, out);
    case 2: return sum_of<2, kAdd>(sources, weights, offset, count, out);
    case 3: return sum_of<3, kAdd>(sources, weights, offset, count, out);
    case 4: return sum_of<4, kAdd>(sources, weights, offset, count, out);
    case 5: return sum_of<5, kAdd>(sources, weights, offset, count, out);
    case 6: return sum_of<6, kAdd>(sources, weights, offset, count, out);
    default: return;
  }
}

template <typename S, typename A, typename O>
inline void sum_of_any(const S* const* sources, const A* weights, int64_t n, int64_t offset,
                       int64_t count, O* out) {
  static_assert(std::is_same_v<O, A>);
  if (n == 0) {
    std::fill(out, out + count, O(0));
    return;
  }
  sum_of_few<false>(sources, weights, std::min(n, kTerms), offset, count, out);
  for (int64_t first = kTerms; first < n; first += kTerms) {
    sum_of_few<true>(sources + first, weights + first, std::min(n - first, kTerms), offset, count,
                     out);
  }
}

template <typename S, typename A>
void weighted_sum(const S* const* sources, const A* weights, int64_t n, int64_t pixels,
                  int64_t channels, int64_t stride, A* out) {
  if (stride == channels) {
    sum_of_any(sources, weights, n, 0, pixels * channels, out);
    return;
  }
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    sum_of_any(sources, weights, n, pixel * stride, channels, out + pixel * channels);
  }
}

template <typename A>
void weighted_sum_of_sums(const A* const* sources, const A* weights, int64_t n, int64_t count,
                          A* out) {
  sum_of_any(sources, weights, n, 0, count, out);
}

template <typename S, typename A>
void weighted_sum_stored(const A* const* sources, const A* weights, int64_t n, int64_t count,
                         S* out) {
  if constexpr (std::is_same_v<S, A>) {
    sum_of_any(sources, weights, n, 0, count, out);
  } else {
    A sums[64];
    for (int64_t begin = 0; begin < count; begin += 64) {
      const int64_t size = std::min<int64_t>(64, count - begin);
      sum_of_any(sources, weights, n, begin, size, sums);
#pragma omp simd
      for (int64_t k = 0; k < size; ++k) store(sums[k], out[begin + k]);
    }
  }
}

template <typename S, typename A>
void finish(const A* sums, int64_t pixels, int64_t channels, const A* bias, const S* addend,
            bool relu, int64_t stride, S* out) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const A* from = sums + pixel * channels;
    S* to = out + pixel * stride;
    const S* more = addend ? addend + pixel * stride : nullptr;
    // Without ReLU the lowest value is let through: NaN compares false either way.
#pragma omp simd
    for (int64_t k = 0; k < channels; ++k) {
      A value = from[k];
      if (bias) value += bias[k];
      if (more) value += widen(more[k]);
      value = relu && value < A(0) ? A(0) : value;
      store(value, to[k]);
    }
  }
}

template <typename S, typename A>
void add_pixels(const S* x, int64_t pixels, int64_t channels, int64_t stride, A* totals) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const S* from = x + pixel * stride;
#pragma omp simd
    for (int64_t k = 0; k < channels; ++k) totals[k] += widen(from[k]);
  }
}

template <typename S, typename A>
void moments(const S* x, int64_t pixels, int64_t channels, int64_t stride, A* mean, A* squares) {
  std::fill(mean, mean + channels, A(0));
  std::fill(squares, squares + channels, A(0));
  add_pixels<S, A>(x, pixels, channels, stride, mean);
  const A share = A(1) / static_cast<A>(pixels);
#pragma omp simd
  for (int64_t k = 0; k < channels; ++k) mean[k] *= share;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const S* from = x + pixel * stride;
#pragma omp simd
    for (int64_t k = 0; k < channels; ++k) {
      const A off = widen(from[k]) - mean[k];
      squares[k] += off * off;
    }
  }
}

template <typename S, typename A>
void normalize(const S* x, int64_t pixels, int64_t channels, const A* mean, const A* scale,
               const A* bias, bool relu, S* out) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, out += channels) {
#pragma omp simd
    for (int64_t k = 0; k < channels; ++k) {
      const A value = (widen(x[k]) - mean[k]) * scale[k] + bias[k];
      store(relu && value < A(0) ? A(0) : value, out[k]);
    }
  }
}

template <typename S, typename A>
void norm_sums(const S* grad, const S* x, int64_t pixels, int64_t channels, const A* mean,
               const A* scale, const A* bias, bool relu, A* sums, A* dots) {
  std::fill(sums, sums + channels, A(0));
  std::fill(dots, dots + channels, A(0));
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += channels, grad += channels) {
#pragma omp simd
    for (int64_t k = 0; k < channels; ++k) {
      const A off = widen(x[k]) - mean[k];
      const A dz = relu && off * scale[k] + bias[k] <= A(0) ? A(0) : widen(grad[k]);
      sums[k] += dz;
      dots[k] += dz * off;
    }
  }
}

template <typename S, typename A>
void norm_gradient(const S* grad, const S* x, int64_t pixels, int64_t channels, const A* mean,
                   const A* scale, const A* bias, const A* off, const A* slope, bool relu, S* out) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
#pragma omp simd
    for (int64_t k = 0; k < channels; ++k) {
      const A from = widen(x[k]) - mean[k];
      const A dz = relu && from * scale[k] + bias[k] <= A(0) ? A(0) : widen(grad[k]);
      store(dz * scale[k] - off[k] - from * slope[k], out[k]);
    }
    x += channels, grad += channels, out += channels;
  }
}

template <typename A>
struct Four {
  A a, b, c, d;
};

template <typename A>
inline Four<A> inputs_transform(const Four<A>& x) {
  return {x.a - x.c, x.b + x.c, x.c - x.b, x.b - x.d};
}

template <typename A>
inline Four<A> outputs_transform(A a, A b) {
  return {a, a + b, a - b, -b};
}

template <typename A>
inline void scatter(const Four<A>& w, const Four<A>& x, const Four<A>& y, const Four<A>& z,
                    int64_t step, A* to) {
  to[0 * step] = w.a, to[1 * step] = x.a, to[2 * step] = y.a, to[3 * step] = z.a;
  to[4 * step] = w.b, to[5 * step] = x.b, to[6 * step] = y.b, to[7 * step] = z.b;
  to[8 * step] = w.c, to[9 * step] = x.c, to[10 * step] = y.c, to[11 * step] = z.c;
  to[12 * step] = w.d, to[13 * step] = x.d, to[14 * step] = y.d, to[15 * step] = z.d;
}

template <typename S, typename A>
void winograd_inputs(const S* x, int64_t row, int64_t channels, int64_t step, A* to) {
#pragma omp simd
  for (int64_t k = 0; k < channels; ++k) {
    const auto column = [&](int64_t i) {
      const S* at = x + i * channels + k;
      return inputs_transform<A>(
          {widen(at[0]), widen(at[row]), widen(at[2 * row]), widen(at[3 * row])});
    };
    const Four<A> p = column(0), q = column(1), r = column(2), s = column(3);
    // Along the rows; what is at place 4 i + j is element i of the columns' j.
    scatter<A>({p.a - r.a, p.b - r.b, p.c - r.c, p.d - r.d},
               {q.a + r.a, q.b + r.b, q.c + r.c, q.d + r.d},
               {r.a - q.a, r.b - q.b, r.c - q.c, r.d - q.d},
               {q.a - s.a, q.b - s.b, q.c - s.c, q.d - s.d}, step, to + k);
  }
}

template <typename S, typename A>
void winograd_outputs(const S* grad, int64_t row, int64_t channels, int64_t step, A* to) {
#pragma omp simd
  for (int64_t k = 0; k < channels; ++k) {
    const S *at = grad + k, *next = at + channels;
    const Four<A> p = outputs_transform<A>(widen(at[0]), widen(at[row]));
    const Four<A> q = outputs_transform<A>(widen(next[0]), widen(next[row]));
    scatter<A>(p, {p.a + q.a, p.b + q.b, p.c + q.c, p.d + q.d},
               {p.a - q.a, p.b - q.b, p.c - q.c, p.d - q.d}, {-q.a, -q.b, -q.c, -q.d}, step,
               to + k);
  }
}

template <typename S, typename A>
void winograd_finish(const A* const* from, int64_t offset, int64_t channels, int64_t rows,
                     int64_t columns, int64_t row, S* to) {
  const A* m[16];
  for (int64_t i = 0; i < 16; ++i) m[i] = from[i] + offset;
  const auto half = [&](int64_t i, int64_t k) {  // a row of places, to its two columns
    const A b = m[4 * i + 1][k], c = m[4 * i + 2][k];
    return std::pair<A, A>(m[4 * i][k] + b + c, b - c - m[4 * i + 3][k]);
  };
  const bool all = rows == 2 && columns == 2;
  A rest[3][64];
  for (int64_t first = 0; first < channels; first += 64) {
    const int64_t count = std::min<int64_t>(64, channels - first);
    S* out = to + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const auto p = half(0, first + i), q = half(1, first + i), r = half(2, first + i),
                 s = half(3, first + i);
      store(p.first + q.first + r.first, out[i]);
      rest[0][i] = p.second + q.second + r.second;
      rest[1][i] = q.first - r.first - s.first;
      rest[2][i] = q.second - r.second - s.second;
    }
    const auto put = [&](const A* values, S* at) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) store(values[i], at[i]);
    };
    if (all || columns == 2) put(rest[0], out + channels);
    if (all || rows == 2) put(rest[1], out + row);
    if (all) put(rest[2], out + row + channels);
  }
}

template <typename S>
void pack(const S* from, const int64_t* taps, int64_t n, int64_t rows, int64_t columns, int64_t row,
          int64_t column, int64_t to_tap, int64_t to_row, S* to) {
  if (column == 1) {
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t r = 0; r < rows; ++r) {
        const S* source = from + taps[t] + r * row;
        std::copy(source, source + columns, to + t * to_tap + r * to_row);
      }
    }
    return;
  }
  if (column <= 64) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t t = 0; t < n; ++t) {
        const S* source = from + taps[t] + r * row;
        S* target = to + t * to_tap + r * to_row;
        for (int64_t c = 0; c < columns; ++c) target[c] = source[c * column];
      }
    }
    return;
  }
  // Columns far apart, often by a power of two: no more of them at a time than a cache set holds.
  constexpr int64_t kColumns = 8, kRows = 16;
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t width = std::min(kColumns, columns - c);
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t height = std::min(kRows, rows - r);
      for (int64_t t = 0; t < n; ++t) {
        const S* source = from + taps[t] + r * row + c * column;
        S* target = to + t * to_tap + r * to_row + c;
        for (int64_t i = 0; i < height; ++i) {
          for (int64_t k = 0; k < width; ++k) target[i * to_row + k] = source[i * row + k * column];
        }
      }
    }
  }
}

template <bool kAdd, typename S>
void unpack_blocks(const S* from, const int64_t* taps, int64_t n, int64_t outs, int64_t channels,
                   int64_t to_out, int64_t to_channel, S* to) {
  constexpr int64_t kBlock = 16;
  for (int64_t c = 0; c < channels; c += kBlock) {
    const int64_t size = std::min(kBlock, channels - c);
    for (int64_t o = 0; o < outs; ++o) {
      for (int64_t i = 0; i < size; ++i) {
        S* target = to + o * to_out + (c + i) * to_channel;
        const S* source = from + (c + i) * n * outs + o;
        for (int64_t t = 0; t < n; ++t) {
          if constexpr (kAdd) {
            store(widen(target[taps[t]]) + widen(source[t * outs]), target[taps[t]]);
          } else {
            target[taps[t]] = source[t * outs];
          }
        }
      }
    }
  }
}

template <typename S>
void unpack(const S* from, const int64_t* taps, int64_t n, int64_t outs, int64_t channels,
            int64_t to_out, int64_t to_channel, bool add, S* to) {
  const auto run = add ? unpack_blocks<true, S> : unpack_blocks<false, S>;
  run(from, taps, n, outs, channels, to_out, to_channel, to);
}

template <typename S, typename A>
constexpr LineKernels<S, A> table(const char* name) {
  return {name, weighted_sum<S, A>, weighted_sum_stored<S, A>, weighted_sum_of_sums<A>,
          finish<S, A>, add_pixels<S, A>, moments<S, A>, normalize<S, A>, norm_sums<S, A>,
          norm_gradient<S, A>, winograd_inputs<S, A>, winograd_outputs<S, A>,
          winograd_finish<S, A>, pack<S>, unpack<S>, transpose<S>};
}

}  // namespace

SPECTRALX_END_TARGET
