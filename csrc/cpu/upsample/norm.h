// Statistics of a map's channels; see norm.cpp.
#pragma once

#include "cpu/upsample/maps.h"

namespace spectralx::cpu {

// Mean and biased variance of each channel of a map, [2, C] in the type of sums.
at::Tensor moments_of(const at::Tensor& map);

}  // namespace spectralx::cpu
