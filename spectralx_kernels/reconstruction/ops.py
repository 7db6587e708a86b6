"""The losses of this room: operator declarations, argument checks, public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectralx_kernels._checks import check_device, check_floating, check_shape
from spectralx_kernels._operator import Operator, prefer_triton
from spectralx_kernels.reconstruction import reference
from spectralx_kernels.reconstruction.patches import check_image, check_patch, square_grid

# Losses are summed in float32 under autocast; predictions may lie channels last.
MASKED_PATCH_LOSS = Operator(
    "masked_patch_loss",
    "(Tensor prediction, Tensor images, Tensor mask, int patch, bool normalize) -> Tensor",
    reference.masked_patch_loss,
    autocast_to=torch.float32,
    prefer=prefer_triton,
    keep_format=True,
)
UPSAMPLED_L1_LOSS = Operator(
    "upsampled_l1_loss",
    "(Tensor prediction, Tensor images) -> Tensor",
    reference.upsampled_l1_loss,
    autocast_to=torch.float32,
    prefer=prefer_triton,
    keep_format=True,
)
BAND_RECONSTRUCTION_LOSS = Operator(
    "band_reconstruction_loss",
    "(Tensor high, Tensor low, Tensor images, Tensor mask, int[2] grid, int[2] base_size) "
    "-> Tensor",
    reference.band_reconstruction_loss,
    autocast_to=torch.float32,
    prefer=prefer_triton,
    keep_format=True,
)
for _operator in (MASKED_PATCH_LOSS, UPSAMPLED_L1_LOSS, BAND_RECONSTRUCTION_LOSS):
    _operator.add_triton("spectralx_kernels.reconstruction.triton")


def _check_mask(mask: Tensor, batch: int, patches: int | str) -> None:
    check_shape("mask", mask, (batch, patches))
    if mask.dtype.is_complex:
        raise TypeError(f"mask: got dtype {mask.dtype}, expected a real dtype or bool")


def masked_patch_loss(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor,
    patch: int,
    *,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of predicted patches, over the masked ones (SatMAE++ and plain MAE).

    Parameters
    ----------
    prediction : [B, L, P*P*C]; a patch vector runs row, column, band. L = H/P * W/P.
    images : [B, C, H, W], the target.
    mask : [B, L], 1 where a patch is masked; floating point, integer or bool. Other weights than
        0 and 1 are weights. Kernels do not read patches of weight 0.
    patch : side P of a patch in pixels.
    normalize : bring every target patch to mean 0 and variance 1 (unbiased, + 1e-6) first.
    backend : overrides the default backend.

    Returns
    -------
    A scalar in the dtype of `prediction` (float32 under autocast), accumulated in float32
    (float64 for float64): the mean over a patch vector, averaged over the masked patches. 0 with
    zero gradient where nothing is masked.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX, stage 1; SatMAE++ (arXiv 2403.05419), which weights it 0.6.
    """
    check_floating("prediction", prediction)
    check_floating("images", images)
    check_image("images", images)
    check_patch("images", images, patch)
    batch, bands, height, width = images.shape
    patches = (height // patch) * (width // patch)
    check_shape("prediction", prediction, (batch, patches, patch * patch * bands))
    _check_mask(mask, batch, patches)
    check_device("images", images, "prediction", prediction)
    check_device("mask", mask, "prediction", prediction)
    loss: Tensor = MASKED_PATCH_LOSS(prediction, images, mask, patch, normalize, backend=backend)
    return loss


def upsampled_l1_loss(prediction: Tensor, images: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean absolute error of an enlarged prediction against the bilinearly enlarged images.

    Parameters
    ----------
    prediction : [B, C, H', W'], for example 2H x 2W; any size.
    images : [B, C, H, W], resized to H' x W' (align_corners False) as the target.
    backend : overrides the default backend.

    Returns
    -------
    A scalar in the dtype of `prediction` (float32 under autocast), accumulated in float32
    (float64 for float64). 0 for an empty batch.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX, stage 1; SatMAE++ (arXiv 2403.05419), which weights it 0.4.
    """
    check_floating("prediction", prediction)
    check_floating("images", images)
    check_image("images", images)
    check_image("prediction", prediction)
    check_shape("prediction", prediction, (*images.shape[:2], "height", "width"))
    check_device("images", images, "prediction", prediction)
    loss: Tensor = UPSAMPLED_L1_LOSS(prediction, images, backend=backend)
    return loss


def band_targets(
    images: Tensor,
    high_size: Sequence[int],
    low_size: Sequence[int],
    base_size: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """What the high- and the low-frequency decoder of ScaleMAE are to predict.

    Parameters
    ----------
    images : [B, C, H, W]; resized to `high_size` by nearest neighbour, which leaves images of
        that size alone and repeats the pixels of smaller ones.
    high_size, low_size : height and width of the two targets in pixels.
    base_size : height and width that the image is averaged down to for the part that the
        high-frequency target leaves out.

    Returns
    -------
    high : [B, C, *high_size], the image minus its average over `base_size` areas, the latter
        enlarged bilinearly.
    low : [B, C, *low_size], the image averaged over areas.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype or shape.

    Source: SpectralX, stage 1; ScaleMAE (arXiv 2212.14532).
    """
    check_floating("images", images)
    check_image("images", images)
    for name, size in (("high_size", high_size), ("low_size", low_size), ("base_size", base_size)):
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"{name}: got {list(size)}, expected two sizes of at least 1")
    return reference.band_targets(images, list(high_size), list(low_size), list(base_size))


def band_reconstruction_loss(
    high: Tensor,
    low: Tensor,
    images: Tensor,
    mask: Tensor,
    *,
    grid: Sequence[int] | None = None,
    base_size: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Loss of the high- and low-frequency predictions of ScaleMAE, added.

    Each is the squared error of the masked pixels, summed over bands, divided by the number of
    masked pixels (not times the bands). The targets are those of `band_targets`, at the sizes of
    the predictions.

    Parameters
    ----------
    high : [B, C, H1, W1], 2H x 2W in the published model.
    low : [B, C, H2, W2], H x W in the published model.
    images : [B, C, H, W].
    mask : [B, L], 1 where a patch is masked, over a grid of patches, row by row, whose sides
        divide the sizes of both predictions; floating point, integer or bool. Kernels do not read
        patches of weight 0.
    grid : rows and columns of patches; None is a square grid.
    base_size : see `band_targets`; the grid of patches (14 x 14 in the published model) if None.
    backend : overrides the default backend.

    Returns
    -------
    A scalar in the dtype of `high` (float32 under autocast), accumulated in float32 (float64 for
    float64). 0 with zero gradient where nothing is masked.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX, stage 1; ScaleMAE (arXiv 2212.14532).
    """
    check_image("images", images)
    for name, tensor in (("high", high), ("low", low), ("images", images)):
        check_floating(name, tensor)
        check_shape(name, tensor, (*images.shape[:2], "height", "width"))
        check_device(name, tensor, "high", high)
    _check_mask(mask, images.shape[0], "patches")
    check_device("mask", mask, "high", high)
    if grid is None:
        grid = square_grid("mask", mask.shape[1])
    elif len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != mask.shape[1]:
        raise ValueError(f"grid: got {list(grid)}, expected two sizes of product {mask.shape[1]}")
    for name, tensor in (("high", high), ("low", low)):
        sizes = zip(tensor.shape[-2:], grid, strict=True)
        if any(size == 0 or size % cells for size, cells in sizes):
            raise ValueError(
                f"{name}: got size {list(tensor.shape[-2:])}, expected multiples of the "
                f"{grid[0]} x {grid[1]} patches of mask"
            )
    base_size = grid if base_size is None else base_size
    if len(base_size) != 2 or min(base_size) < 1:
        raise ValueError(f"base_size: got {list(base_size)}, expected two sizes of at least 1")
    loss: Tensor = BAND_RECONSTRUCTION_LOSS(
        high, low, images, mask, list(grid), list(base_size), backend=backend
    )
    return loss
