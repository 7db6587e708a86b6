"""Images as patches: plain rearrangements with argument checks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spectralx_kernels._checks import check_range, check_shape
from spectralx_kernels.reconstruction import reference


def check_image(name: str, images: Tensor) -> None:
    """`images` is [B, C, H, W] with C, H, W of at least 1."""
    check_shape(name, images, ("batch", "bands", "height", "width"))
    if 0 in images.shape[1:]:
        raise ValueError(
            f"{name}: got shape {list(images.shape)}, expected bands, height, width of at least 1"
        )


def check_patch(name: str, images: Tensor, patch: int) -> None:
    """`patch` divides height and width of `images`."""
    height, width = images.shape[-2:]
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"patch: got {patch}, expected a divisor of the height {height} and width {width} "
            f"of {name}"
        )


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into square patches, row by row.

    Parameters
    ----------
    images : [B, C, H, W], any dtype.
    patch : side P of a patch in pixels; divides H and W.

    Returns
    -------
    [B, H/P * W/P, P*P*C]. A patch vector runs row, column, band: the band is fastest.

    Raises
    ------
    ValueError : images of another shape, or a patch that does not divide them.
    """
    check_image("images", images)
    check_patch("images", images, patch)
    return reference.patchify(images, patch)


def unpatchify(patches: Tensor, patch: int, size: Sequence[int] | None = None) -> Tensor:
    """Put patches back together: undoes `patchify`.

    Parameters
    ----------
    patches : [B, L, P*P*C].
    patch : side P of a patch in pixels.
    size : height and width of the images in pixels; None is a square grid of patches.

    Returns
    -------
    [B, C, H, W].

    Raises
    ------
    ValueError : L is no square without `size`, or the sizes do not fit.
    """
    check_shape("patches", patches, ("batch", "patches", "length"))
    check_range("patch", patch, 1, 2**31)
    if size is None:
        rows, columns = square_grid("patches", patches.shape[1])
        size = [rows * patch, columns * patch]
    height, width = size
    if (
        min(size) < 1
        or height % patch
        or width % patch
        or height * width != patches.shape[1] * patch * patch
    ):
        raise ValueError(
            f"size: got {list(size)}, expected multiples of {patch} that hold "
            f"{patches.shape[1]} patches"
        )
    if patches.shape[2] == 0 or patches.shape[2] % (patch * patch):
        raise ValueError(
            f"patches: got vectors of {patches.shape[2]}, expected a multiple of "
            f"patch * patch = {patch * patch}"
        )
    return reference.unpatchify(patches, patch, height, width)


def square_grid(name: str, length: int) -> tuple[int, int]:
    """The sides of a square grid of `length` cells, or a ValueError naming the argument."""
    side = int(length**0.5 + 0.5)
    if side * side != length or length < 1:
        raise ValueError(f"{name}: got {length} patches, expected a square number")
    return side, side
