"""Images as patches and patches as tokens: plain rearrangements with argument checks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def check_indices(name: str, ids: Tensor) -> None:
    """`ids` is int64, as torch.gather wants it."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: got dtype {ids.dtype}, expected torch.int64")


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


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """The tokens at `ids`, in that order; the gradient goes back to where they came from.

    Parameters
    ----------
    tokens : [B, L, D].
    ids : [B, K], int64 in [0, L); `ids_keep` of `random_masking`.

    Returns
    -------
    [B, K, D].

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype or shape.
    """
    check_shape("tokens", tokens, ("batch", "tokens", "width"))
    check_shape("ids", ids, (tokens.shape[0], "kept"))
    check_indices("ids", ids)
    return reference.gather_tokens(tokens, ids)


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """Put kept tokens back in their places and the mask token in all others.

    Parameters
    ----------
    tokens : [B, K, D], the kept tokens in the order of `ids_keep`.
    ids_restore : [B, L], int64, from `random_masking`; L >= K.
    mask_token : [D] or [1, 1, D].

    Returns
    -------
    [B, L, D] in the dtype of `tokens`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype or shape.
    """
    check_shape("tokens", tokens, ("batch", "kept", "width"))
    check_shape("ids_restore", ids_restore, (tokens.shape[0], "tokens"))
    check_indices("ids_restore", ids_restore)
    if tokens.shape[1] > ids_restore.shape[1]:
        raise ValueError(
            f"tokens: got {tokens.shape[1]} of them, expected at most the "
            f"{ids_restore.shape[1]} of ids_restore"
        )
    if mask_token.dim() == 3:
        check_shape("mask_token", mask_token, (1, 1, tokens.shape[2]))
    else:
        check_shape("mask_token", mask_token, (tokens.shape[2],))
    return reference.restore_tokens(tokens, ids_restore, mask_token)
