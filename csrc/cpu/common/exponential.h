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

// log(1 + u) for 0 <= u <= 1, as 2 atanh(u / (2 + u)).
inline float log_one_plus(float u) {
  const float s = u / (2.0f + u), q = s * s;
  float p = 1.0f / 15;
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  p = p * q + 1.0f;
  return 2.0f * s * p;
}

inline double log_one_plus(double u) { return std::log1p(u); }

// log(x) for 1 <= x < 3e38. NaN in, NaN out.
inline float logarithm(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  const float exponent = static_cast<float>((bits >> 23) - 127);
  const float fraction = std::bit_cast<float>((bits & 0x7fffff) | 0x3f800000);  // 1 to 2
  const float value = exponent * 0.6931471805599453f + log_one_plus(fraction - 1.0f);
  return value + (x - x);
}

inline double logarithm(double x) { return std::log(x); }

}  // namespace
