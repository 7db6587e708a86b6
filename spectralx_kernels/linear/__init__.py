"""A linear layer by the products that are fastest on this machine."""

from spectralx_kernels.linear.modules import Linear
from spectralx_kernels.linear.ops import linear

__all__ = ["Linear", "linear"]
