"""GELU and its derivative in Triton, for the kernels of any room."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def below(z):
    """The normal distribution's share below z; GELU is z times it."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z):
    """The derivative of GELU at z."""
    return below(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
