#pragma once

namespace spectralx {

// Added to the variance of a patch: PATCH_NORM_EPS in spectralx_kernels/reconstruction/reference.py.
inline constexpr double kPatchNormEpsilon = 1e-6;

}  // namespace spectralx
