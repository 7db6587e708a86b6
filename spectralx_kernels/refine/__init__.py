"""Are-adapter: refines tokens by the attributes they are matched with."""

from spectralx_kernels.refine.modules import AreAdapter
from spectralx_kernels.refine.ops import (
    add_weighted_halves,
    gather_norm,
    gather_norm_mix,
    match_argmax,
)

__all__ = [
    "AreAdapter",
    "add_weighted_halves",
    "gather_norm",
    "gather_norm_mix",
    "match_argmax",
]
