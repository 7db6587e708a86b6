"""Linear layers, of rows and of patches, by the products that are fastest on this machine."""

from spectralx_kernels.linear.modules import Linear, PatchConv2d
from spectralx_kernels.linear.ops import linear, patch_conv2d

__all__ = ["Linear", "PatchConv2d", "linear", "patch_conv2d"]
