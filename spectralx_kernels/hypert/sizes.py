"""Sizes of HyperT that follow from others."""

from __future__ import annotations

from spectralx_kernels.hypert.stem_module import STRIDE

PATCH = 16  # side of a patch in pixels, unless said otherwise


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < 1 or width < 1 or height % STRIDE or width % STRIDE:
        raise ValueError(
            f"image_size: got {height} x {width}, expected positive multiples of {STRIDE}"
        )
    return height, width


def patches_of(image_size: tuple[int, int], side: int = PATCH) -> int:
    """Patches of `side` x `side` pixels that cover an image."""
    return -(-image_size[0] // side) * -(-image_size[1] // side)


def heads_for(width: int, num_heads: int) -> int:
    """The largest number of heads up to `num_heads` that divides `width`."""
    return next(heads for heads in range(num_heads, 0, -1) if width % heads == 0)
