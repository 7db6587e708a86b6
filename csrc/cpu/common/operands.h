// Operands of products for files compiled once for each instruction set: bfloat16 to and from float,
// transposition, and rows packed to the panel that common/product.h multiplies by. Include it as
// common/exponential.h, after <algorithm>, <bit>, <cstdint>, <cstring>, <type_traits>, <utility> and
// common/product.h.
#pragma once

#include "cpu/common/storage.h"

namespace {

using spectralx::cpu::kPanel;
using spectralx::cpu::Wide;

// An element of Op and back, for loops over its 16-bit words too.
template <typename Op>
using Element = std::conditional_t<sizeof(Op) == 2, uint16_t, Op>;
template <typename Op>
const Element<Op>* elements(const Op* values) {
  return reinterpret_cast<const Element<Op>*>(values);
}
template <typename Op>
Element<Op>* elements(Op* values) {
  return reinterpret_cast<Element<Op>*>(values);
}
inline float value_of(uint16_t bits) { return from_bits(bits); }
inline float value_of(float value) { return value; }
inline double value_of(double value) { return value; }
template <typename Op>
inline Element<Op> rounded(Wide<Op> value) {
  if constexpr (sizeof(Op) == 2) {
    return static_cast<uint16_t>(bfloat16_bits(value));
  } else {
    return value;
  }
}

template <typename Op>
void narrow(const Wide<Op>* from, int64_t width, Op* to) {
  auto* values = elements(to);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) values[i] = rounded<Op>(from[i]);
}

typedef uint32_t Lanes __attribute__((vector_size(64)));  // sixteen 32-bit values

// One step of a transposition of 16 x 16: rows kStep apart exchange lanes kStep apart.
template <int kStep, int... n>
inline void exchange(Lanes (&rows)[16], std::integer_sequence<int, n...>) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & kStep) continue;
    const Lanes a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shufflevector(a, b, (n & kStep ? 16 + n - kStep : n)...);
    rows[i + kStep] = __builtin_shufflevector(a, b, (n & kStep ? 16 + n : n + kStep)...);
  }
}

// A transposition of 16 x 16.
inline void turn(Lanes (&rows)[16]) {
  exchange<8>(rows, std::make_integer_sequence<int, 16>());
  exchange<4>(rows, std::make_integer_sequence<int, 16>());
  exchange<2>(rows, std::make_integer_sequence<int, 16>());
  exchange<1>(rows, std::make_integer_sequence<int, 16>());
}

// target[c * ld + r] = source[r * stride + c]
template <typename T>
void transpose_words(const T* source, int64_t rows, int64_t stride, int64_t columns, T* target,
                     int64_t ld) {
  int64_t c = 0;
  if constexpr (sizeof(T) == 4) {
    for (; c + 16 <= columns; c += 16) {
      int64_t r = 0;
      for (; r + 16 <= rows; r += 16) {
        Lanes block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) std::memcpy(&block[i], source + (r + i) * stride + c, 64);
        turn(block);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) std::memcpy(target + (c + i) * ld + r, &block[i], 64);
      }
      for (; r < rows; ++r) {
        for (int64_t i = c; i < c + 16; ++i) target[i * ld + r] = source[r * stride + i];
      }
    }
  }
  for (; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) target[c * ld + r] = source[r * stride + c];
  }
}

// The same of rows far apart, which the processor does not fetch by itself.
template <typename T>
void transpose_rows(const T* source, int64_t rows, int64_t stride, int64_t columns, T* target,
                    int64_t ld) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T)), kAhead = 4 * kLine;
  for (int64_t c = 0; c < columns; c += kLine) {
    if (c + kAhead < columns) {
      for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(source + r * stride + c + kAhead, 0, 2);
    }
    transpose_words(source + c, rows, stride, std::min(kLine, columns - c), target + c * ld, ld);
  }
}

// Lanes from n on to zero.
template <typename T>
void clear_lanes(T* panel, int64_t features, int64_t n) {
  if (n == kPanel) return;
  for (int64_t f = 0; f < features; ++f) std::fill(panel + f * kPanel + n, panel + (f + 1) * kPanel, T(0));
}

template <typename T>
const uint32_t* words(const T* values) {
  return reinterpret_cast<const uint32_t*>(values);
}
template <typename T>
uint32_t* words(T* values) {
  return reinterpret_cast<uint32_t*>(values);
}

// rows [n][stride] of `features` each, n <= 32, to an operand panel: zeros in the lanes from n on.
template <typename Op>
void pack(const Op* rows, int64_t n, int64_t stride, int64_t features, Op* panel) {
  if constexpr (sizeof(Op) == 2) {
    transpose_rows(words(rows), n, stride / 2, features / 2, words(panel), kPanel);
    clear_lanes(words(panel), features / 2, n);
  } else {
    transpose_rows(rows, n, stride, features, panel, kPanel);
    clear_lanes(panel, features, n);
  }
}

}  // namespace
