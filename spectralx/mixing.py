"""CutMix: training images with a part of another one in their place."""

from __future__ import annotations

import torch
from torch import Tensor


def cutmix(images: Tensor, masks: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """A rectangle of some images and of their masks replaced by the same one of the next image.

    The rectangle has the image's shape, a share of its area drawn evenly from 0 to 1, and lies at
    a random place. What surrounds a pixel then says less of where it is, so less of a few scenes
    can be learnt by heart.

    Parameters
    ----------
    images : [B, C, H, W].
    masks : [B, H, W].
    probability : of each image to be given such a part; the next of the last is the first, and a
        batch of one stays as it is.

    Returns
    -------
    New tensors; random through torch's generator of the CPU, whatever the device.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features", ICCV 2019; for label maps French et al., BMVC 2020.
    """
    height, width = images.shape[-2:]
    chosen, area, top, left = torch.rand(4, len(images)).tolist()
    mixed_images, mixed_masks = images.clone(), masks.clone()
    for index in range(len(images)):
        if chosen[index] >= probability:
            continue
        side = area[index] ** 0.5
        rows, columns = max(round(height * side), 1), max(round(width * side), 1)
        row = int(top[index] * (height - rows + 1))
        column = int(left[index] * (width - columns + 1))
        part = (..., slice(row, row + rows), slice(column, column + columns))
        other = (index + 1) % len(images)
        mixed_images[index][part] = images[other][part]
        mixed_masks[index][part] = masks[other][part]
    return mixed_images, mixed_masks
