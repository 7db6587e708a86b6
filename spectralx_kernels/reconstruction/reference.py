"""Masked reconstruction in plain PyTorch: the specification of this room and its ``eager`` backend.

SpectralX, stage 1 (arXiv 2508.01731), with the losses of SatMAE++ and ScaleMAE. Notation in
README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH_NORM_EPS = 1e-6  # added to the variance of a patch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep [B, keep], mask [B, L] (True masked), ids_restore [B, L] from noise [B, L]."""
    order = torch.argsort(noise.detach(), dim=1, stable=True)  # equal noise: lowest index first
    ranks = torch.arange(noise.shape[1], device=noise.device).expand_as(order)
    ids_restore = torch.zeros_like(order).scatter(1, order, ranks)
    return order[:, :keep], ids_restore >= keep, ids_restore


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens [B, L, D], ids [B, K] -> [B, K, D]."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """tokens [B, K, D], ids_restore [B, L], mask_token [D] -> [B, L, D]."""
    batch, kept, width = tokens.shape
    filler = (
        mask_token.to(tokens.dtype).reshape(-1).expand(batch, ids_restore.shape[1] - kept, width)
    )
    return gather_tokens(torch.cat([tokens, filler], dim=1), ids_restore)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, H/P * W/P, P*P*C]; a patch runs row, column, band."""
    batch, bands, height, width = images.shape
    blocks = images.reshape(batch, bands, height // patch, patch, width // patch, patch)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3, 5).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """[B, H/P * W/P, P*P*C] -> [B, C, H, W]: undoes `patchify`."""
    batch, _, length = patches.shape
    bands = length // (patch * patch)
    blocks = patches.reshape(batch, height // patch, width // patch, patch, patch, bands)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(batch, bands, height, width)


def _masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """Sum of errors * mask over the sum of mask; 0, with zero gradient, where nothing is masked."""
    count = mask.sum()
    return (errors * mask).sum() / torch.where(count == 0, torch.ones_like(count), count)


def masked_patch_loss(
    prediction: Tensor, images: Tensor, mask: Tensor, patch: int, normalize: bool
) -> Tensor:
    """Mean squared error over the masked patches; prediction [B, L, P*P*C], mask [B, L]."""
    wide = accumulation_dtype(prediction.dtype)
    target = patchify(images.to(wide), patch)
    if normalize:
        length = target.shape[-1]
        variance, mean = torch.var_mean(target, dim=-1, correction=min(1, length - 1), keepdim=True)
        target = (target - mean) / (variance + PATCH_NORM_EPS).sqrt()
    errors = (prediction.to(wide) - target).square().mean(dim=-1)
    return _masked_mean(errors, mask.to(wide)).to(prediction.dtype)


def upsampled_l1_loss(prediction: Tensor, images: Tensor) -> Tensor:
    """Mean |prediction - images resized bilinearly|; prediction [B, C, H', W']."""
    wide = accumulation_dtype(prediction.dtype)
    size = prediction.shape[-2:]
    target = F.interpolate(images.to(wide), size=size, mode="bilinear", align_corners=False)
    errors = (prediction.to(wide) - target).abs()
    return (errors.sum() / max(errors.numel(), 1)).to(prediction.dtype)


def band_targets(
    images: Tensor, high_size: list[int], low_size: list[int], base_size: list[int]
) -> tuple[Tensor, Tensor]:
    """High-frequency target [B, C, *high_size] and low-frequency target [B, C, *low_size]."""
    full = F.interpolate(images, size=high_size, mode="nearest")
    low = F.interpolate(full, size=low_size, mode="area")
    base = F.interpolate(full, size=base_size, mode="area")
    base = F.interpolate(base, size=high_size, mode="bilinear", align_corners=False)
    return full - base, low


def masked_image_loss(prediction: Tensor, target: Tensor, mask: Tensor, grid: list[int]) -> Tensor:
    """Squared error, summed over bands, per masked pixel; mask [B, L] over a grid of patches."""
    rows, columns = (size // cells for size, cells in zip(target.shape[-2:], grid, strict=True))
    mask = mask.unflatten(1, (grid[0], grid[1]))
    mask = mask.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)  # [B, H, W]
    return _masked_mean((prediction - target).square().sum(dim=1), mask)


def band_reconstruction_loss(
    high: Tensor, low: Tensor, images: Tensor, mask: Tensor, grid: list[int], base_size: list[int]
) -> Tensor:
    """Loss of the high- and the low-frequency prediction, [B, C, H, W] each, added."""
    wide = accumulation_dtype(high.dtype)
    high_target, low_target = band_targets(
        images.to(wide), list(high.shape[-2:]), list(low.shape[-2:]), base_size
    )
    mask = mask.to(wide)
    loss = masked_image_loss(high.to(wide), high_target, mask, grid)
    return (loss + masked_image_loss(low.to(wide), low_target, mask, grid)).to(high.dtype)
