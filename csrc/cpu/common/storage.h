// Between what tensors hold and what is computed with, for files compiled once for each instruction
// set: include it between SPECTRALX_BEGIN_TARGET and SPECTRALX_END_TARGET, after <bit>, <cstdint> and
// <c10/util/BFloat16.h>. Internal linkage, so that no copy for one instruction set serves another.
#pragma once

namespace {

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(c10::BFloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
}

inline void store(float value, float& to) { to = value; }
inline void store(double value, double& to) { to = value; }
inline void store(float value, c10::BFloat16& to) {  // to the nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.x = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

}  // namespace
