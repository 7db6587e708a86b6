// Between what tensors hold and what is computed with, for files compiled once for each instruction
// set: include it between SPECTRALX_BEGIN_TARGET and SPECTRALX_END_TARGET, after <bit>, <cstdint> and
// <c10/util/BFloat16.h>. Internal linkage, so that no copy for one instruction set serves another.
#pragma once

namespace {

// To the nearest bfloat16, ties to even; NaN stays one.
inline uint32_t bfloat16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value == value ? rounded : 0x7fc0u;
}

inline float from_bits(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(c10::BFloat16 value) { return from_bits(value.x); }

inline void store(float value, float& to) { to = value; }
inline void store(double value, double& to) { to = value; }
inline void store(float value, c10::BFloat16& to) {
  to.x = static_cast<uint16_t>(bfloat16_bits(value));
}

}  // namespace
