// Exponential and logarithms that vectorise, for files compiled once for each instruction set: include
// it between SPECTRALX_BEGIN_TARGET and SPECTRALX_END_TARGET, after <bit>, <cmath> and <cstdint>.
// Internal linkage, so that no copy for one instruction set serves another.
#pragma once

namespace {

// exp(x) for x <= 88: Taylor series on [-ln 2 / 2, ln 2 / 2], relative error under 2e-7; below -87
// it stays at 1e-38. NaN in, NaN out.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = (x * 1.4426950408889634f + magic) - magic;
  const float t = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  float p = 1.0f / 5040;
  p = p * t + 1.0f / 720;
  p = p * t + 1.0f / 120;
  p = p * t + 1.0f / 24;
  p = p * t + 1.0f / 6;
  p = p * t + 0.5f;
  p = p * t + 1.0f;
  p = p * t + 1.0f;
  const int32_t exponent = static_cast<int32_t>(n) + 127;
  return p * std::bit_cast<float>(exponent << 23);
}

inline double exponential(double x) { return std::exp(x); }

// log(x) for a normal x > 0, relative error under 3e-7 away from 1, absolute near it; NaN for NaN
// and infinity.
inline float logarithm(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  const int32_t e = (bits - 0x3f3504f3) >> 23;  // x = 2^e m with m in [sqrt(1/2), sqrt(2))
  const float m = std::bit_cast<float>(bits - (e << 23));
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  float p = 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  p = p * q + 1.0f;
  return 2.0f * s * p + static_cast<float>(e) * 0.6931471805599453f + (x - x);
}

inline double logarithm(double x) { return std::log(x); }

}  // namespace
