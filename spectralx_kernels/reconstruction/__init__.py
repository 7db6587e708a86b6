"""Masked reconstruction: masking, patches, prediction heads and losses of both families."""

from spectralx_kernels.reconstruction.heads import (
    channel_norm,
    channel_norm_conv2d,
    gelu_grouped_conv2d,
    pixel_head,
)
from spectralx_kernels.reconstruction.masking import (
    gather_tokens,
    random_masking,
    restore_tokens,
)
from spectralx_kernels.reconstruction.ops import (
    band_reconstruction_loss,
    band_targets,
    masked_patch_loss,
    upsampled_l1_loss,
)
from spectralx_kernels.reconstruction.patches import patchify, unpatchify

__all__ = [
    "band_reconstruction_loss",
    "band_targets",
    "channel_norm",
    "channel_norm_conv2d",
    "gather_tokens",
    "gelu_grouped_conv2d",
    "masked_patch_loss",
    "patchify",
    "pixel_head",
    "random_masking",
    "restore_tokens",
    "unpatchify",
    "upsampled_l1_loss",
]
