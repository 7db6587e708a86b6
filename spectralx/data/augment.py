"""Augmentation: transforms of one image and its label map, random only through a generator.

A transform takes (image [C, H, W], mask [h, w] int64, generator) and returns both. Flips,
quarter turns and crops move image and mask together, so up to there both have one size; images are
resized bilinearly, masks by nearest neighbour (pixel centres aligned in both).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Transform(Protocol):
    """Image and mask to image and mask; all randomness comes from `generator`."""

    def __call__(
        self, image: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]: ...


class Compose:
    """Transforms one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)

    def __call__(
        self, image: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        for transform in self.transforms:
            image, mask = transform(image, mask, generator)
        return image, mask


class RandomFlip:
    """Left-right and up-down, each with probability one half."""

    def __call__(
        self, image: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(2, (2,), generator=generator).tolist()
        axes = [axis for axis, flip in zip((-1, -2), chosen, strict=True) if flip]
        return image.flip(axes), mask.flip(axes)


class RandomQuarterTurn:
    """0, 90, 180 or 270 degrees, equally likely; height and width change places at 90 and 270."""

    def __call__(
        self, image: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        turns = int(torch.randint(4, (), generator=generator))
        return torch.rot90(image, turns, (-2, -1)), torch.rot90(mask, turns, (-2, -1))


class RandomCrop:
    """A part of `size` pixels at a random place.

    Raises ValueError for an image smaller than that.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.size = image_size(size)

    def __call__(
        self, image: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        height, width = self.size
        rows, columns = image.shape[-2:]
        if rows < height or columns < width:
            raise ValueError(
                f"image: found {rows}x{columns} pixels; expected {height}x{width} or more to crop"
            )
        return _crop(image, mask, self.size, generator)


class RandomResizedCrop:
    """A random part, a share of the area drawn from `scale` wide, resized to `size`.

    The part has the shape of the whole image, so objects keep their proportions.
    """

    def __init__(
        self, size: int | tuple[int, int], *, scale: tuple[float, float] = (0.5, 1.0)
    ) -> None:
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"scale: found {scale}; expected 0 < lowest <= highest <= 1")
        self.scale = scale
        self.resize = Resize(size)

    def __call__(
        self, image: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        low, high = self.scale
        area = low + (high - low) * float(torch.rand((), generator=generator))
        rows, columns = (max(1, round(side * area**0.5)) for side in image.shape[-2:])
        image, mask = _crop(image, mask, (rows, columns), generator)
        return self.resize(image, mask, generator)


class Resize:
    """The whole image to `size`.

    Parameters
    ----------
    size : side, or (height, width), in pixels.
    mask : also resize the mask; False leaves it at the file's size, for scores at native size.
    """

    def __init__(self, size: int | tuple[int, int], *, mask: bool = True) -> None:
        self.size = image_size(size)
        self.mask = mask
        self.image = True

    def __call__(
        self, image: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if self.image and tuple(image.shape[-2:]) != self.size:
            image = F.interpolate(
                image[None], size=self.size, mode="bilinear", align_corners=False
            )[0]
        if self.mask and tuple(mask.shape[-2:]) != self.size:
            # nearest-exact works on floating point only; float64 holds every label exactly.
            small = mask[None, None].to(torch.float64)
            mask = F.interpolate(small, size=self.size, mode="nearest-exact")[0, 0].to(mask.dtype)
        return image, mask


def without_resizing(transform: Transform | None) -> Transform | None:
    """`transform` but for the resizing of images; masks are resized as before."""
    if isinstance(transform, Compose):
        return Compose([_kept(step) for step in transform.transforms])
    return None if transform is None else _kept(transform)


def _kept(transform: Transform) -> Transform:
    other = copy(transform)
    if isinstance(other, Resize):
        other.image = False
    elif isinstance(other, RandomResizedCrop):
        other.resize = copy(other.resize)
        other.resize.image = False
    return other


def image_size(size: int | Sequence[int]) -> tuple[int, int]:
    """`size` as (height, width). Raises ValueError unless it is one or two positive integers."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(side < 1 for side in pair):
        raise ValueError(f"size: found {size}; expected a side or (height, width), in pixels")
    return pair[0], pair[1]


def _crop(
    image: Tensor, mask: Tensor, size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    height, width = size
    row = int(torch.randint(image.shape[-2] - height + 1, (), generator=generator))
    column = int(torch.randint(image.shape[-1] - width + 1, (), generator=generator))
    area = (..., slice(row, row + height), slice(column, column + width))
    return image[area], mask[area]
