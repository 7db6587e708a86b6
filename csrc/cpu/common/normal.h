// The normal distribution, by which GELU and its derivative are formed, for files compiled once for each
// instruction set: include it as common/exponential.h, which it includes.
#pragma once

#include "cpu/common/exponential.h"

namespace {

// The normal distribution at x, and its density there.
template <typename A>
struct Normal {
  A below, density;
};

// Abramowitz and Stegun 7.1.26, which shares the exponential with the density: absolute error of
// the distribution under 1e-7, and relative to it in the left tail.
inline Normal<float> normal(float x) {
  const float size = std::abs(x);
  const float e = exponential(-0.5f * x * x);
  const float t = 1.0f / (1.0f + 0.23164189f * size);
  float p = 0.5307027145f;
  p = p * t - 0.7265760135f;
  p = p * t + 0.7107068705f;
  p = p * t - 0.142248368f;
  p = p * t + 0.127414796f;
  const float tail = p * t * e;
  return {x < 0.0f ? tail : 1.0f - tail, 0.3989422804f * e};
}

inline Normal<double> normal(double x) {
  return {0.5 * std::erfc(-x * 0.70710678118654752), 0.3989422804014327 * std::exp(-0.5 * x * x)};
}

}  // namespace
