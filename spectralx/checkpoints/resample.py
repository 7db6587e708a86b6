"""Weights of other bands, patch sizes and grids: what of them depends on these, made to fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def band_weights(found: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """How each band of a file is put together from the bands of a model, [wanted, found].

    Each band of the file is the mean of the model's bands around it, weighted by how near they
    are: full weight at its own wavelength, none at that of its neighbours, and past the last band
    as far as its neighbour is on the other side. Where no band is that near the nearest one
    stands in. Columns sum to one, so a flat spectrum gives the same tokens as before; bands far
    from all of the file's (short-wave infrared against RGB) have no weight.

    Parameters
    ----------
    found : wavelengths of the file's bands, any unit and order, no two alike.
    wanted : wavelengths of the model's bands in the same unit.

    Returns
    -------
    float64.
    """
    centres = torch.tensor(found, dtype=torch.float64)
    bands = torch.tensor(wanted, dtype=torch.float64)
    weights = torch.zeros(len(bands), len(centres), dtype=torch.float64)
    for index, centre in enumerate(centres):
        gaps = centres - centre
        below, above = -gaps[gaps < 0], gaps[gaps > 0]
        down = below.min() if len(below) else above.min() if len(above) else torch.inf
        up = above.min() if len(above) else down
        distance = torch.where(bands < centre, (centre - bands) / down, (bands - centre) / up)
        near = (1 - distance).clamp(min=0)
        if near.sum() == 0:
            near[(bands - centre).abs().argmin()] = 1
        weights[:, index] = near / near.sum()
    return weights


def band_interpolation(found: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """How each predicted band of a model is put together from those of a file, [wanted, found].

    Linear between the two nearest wavelengths, the last band past the ends. Rows sum to one.
    """
    order = sorted(range(len(found)), key=lambda index: found[index])
    centres = torch.tensor([found[index] for index in order], dtype=torch.float64)
    weights = torch.zeros(len(wanted), len(found), dtype=torch.float64)
    for row, wavelength in enumerate(wanted):
        right = int((centres < wavelength).sum())
        left, right = max(right - 1, 0), min(right, len(order) - 1)
        gap = float(centres[right] - centres[left])
        share = 0.5 if gap == 0 else float((wavelength - centres[left]) / gap)
        weights[row, order[left]] += 1 - share
        weights[row, order[right]] += share
    return weights


def resample_bands(weight: Tensor, mix: Tensor, dim: int) -> Tensor:
    """`weight` with its bands along `dim` mixed by `mix` [new, old]."""
    moved = weight.double().movedim(dim, 0)
    mixed = torch.einsum("no,o...->n...", mix, moved)
    return mixed.movedim(0, dim).to(weight.dtype)


def resample_patches(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A patch convolution's kernels [D, C, h, w] for patches of another size.

    The kernels whose product with a bilinearly resized patch is, as nearly as can be, that of the
    kernels given with the patch before (Beyer et al., "FlexiViT", 2023): the pseudo-inverse of
    the resizing, along rows and columns.
    """
    height, width = weight.shape[-2:]
    rows, columns = _kernel_resize(height, size[0]), _kernel_resize(width, size[1])
    return (rows @ weight.double() @ columns.T).to(weight.dtype)


def _kernel_resize(found: int, wanted: int) -> Tensor:
    """[wanted, found] in float64."""
    unit = torch.eye(found, dtype=torch.float64)[:, None, None]  # [found, 1, 1, found]
    smaller = wanted < found
    resized = F.interpolate(unit, size=(1, wanted), mode="bilinear", antialias=smaller)
    resize = resized[:, 0, 0].T  # [wanted, found]: a patch's line to its resized one
    inverse: Tensor = torch.linalg.pinv(resize.T)
    return inverse


def resample_positions(table: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Learned positions [1, prefix + N, D] of a square grid, bicubically for another grid.

    The first `prefix` rows belong to no patch and stay.
    """
    first, patches = table[:, :prefix], table[:, prefix:]
    side = round(patches.shape[1] ** 0.5)
    square = patches.float().transpose(1, 2).unflatten(2, (side, side))
    smaller = min(grid) < side
    resized = F.interpolate(square, size=grid, mode="bicubic", antialias=smaller)
    return torch.cat([first, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
