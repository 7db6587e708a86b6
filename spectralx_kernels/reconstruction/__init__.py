"""Masked reconstruction: random masking, patches and the losses of SatMAE++ and ScaleMAE."""

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
    "gather_tokens",
    "masked_patch_loss",
    "patchify",
    "random_masking",
    "restore_tokens",
    "unpatchify",
    "upsampled_l1_loss",
]
