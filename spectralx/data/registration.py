"""Images moved to where their labels are: maps and sensors are seldom laid over each other exactly.

Half a pixel matters where labels change from pixel to pixel.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .raster import Array, valid_values

# Least share of a place's weight that valid pixels must have, but for round-off.
_WHOLE = 1 - 1e-6


def at_offset(
    pixels: Array, nodata: float | None, offset: tuple[float, float]
) -> tuple[Array, float | None]:
    """The image at `offset` from each of its pixels, by cubic splines; beyond it, its border.

    Parameters
    ----------
    pixels : [C, H, W], as stored.
    nodata : value of missing pixels; None where there is none.
    offset : rows down and columns to the right, in pixels.

    Returns
    -------
    float32 [C, H, W], NaN where a pixel next to the place is missing, and None; without an offset
    what was given.
    """
    if not any(offset):
        return pixels, nodata
    valid = valid_values(pixels, nodata)
    move = (-offset[0], -offset[1])
    found = np.full(pixels.shape, np.nan, np.float32)
    for band, (values, known) in enumerate(zip(pixels, valid, strict=True)):
        if not known.any():
            continue
        # What is missing takes the mean of its band, so that splines do not swing beside it.
        whole = np.where(known, values, values[known].mean()).astype(np.float64)
        found[band] = ndimage.shift(whole, move, order=3, mode="nearest")
        if not known.all():
            share = ndimage.shift(known.astype(np.float64), move, order=1, mode="nearest")
            found[band][share < _WHOLE] = np.nan
    return found, None
