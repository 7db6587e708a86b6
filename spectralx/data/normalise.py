"""Scaling of pixel values before the model sees them.

``"image"`` is the paper's: each band of each image to [0, 1] by its own minimum and maximum.
``"fixed"`` uses one mean and deviation a band, measured once over the training files of the
source domain, so that absolute reflectance survives. Missing values take no part in any statistic
and are 0 afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .raster import DataError, data_error

NORMALISATIONS = ("image", "fixed")

Values = npt.NDArray[np.float32]
Valid = npt.NDArray[np.bool_]


class Normalisation(Protocol):
    """Values [C, H, W] and their validity [C, H, W] to values [C, H, W], 0 where invalid."""

    def __call__(self, values: Values, valid: Valid) -> Values: ...


class ImageMinMax:
    """Each band to [0, 1] by the minimum and maximum of its valid values; a flat band becomes 0."""

    def __call__(self, values: Values, valid: Valid) -> Values:
        complete = bool(valid.all())
        low = (values if complete else np.where(valid, values, np.inf)).min((1, 2), keepdims=True)
        high = (values if complete else np.where(valid, values, -np.inf)).max((1, 2), keepdims=True)
        span = high - low
        usable = np.isfinite(span) & (span > 0)
        low = np.where(usable, low, 0.0).astype(np.float32)
        inverse = np.where(usable, 1.0 / np.where(usable, span, 1.0), 0.0).astype(np.float32)
        return np.where(valid, (values - low) * inverse, np.float32(0.0))


class FixedStatistics:
    """Each band's mean minus to plus two standard deviations to [0, 1], clipped there.

    Parameters
    ----------
    mean, std : one number a band, in the units of the files.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std):
            raise ValueError(f"std: found {len(std)} values; expected {len(mean)}, as many as mean")
        self.mean = np.asarray(mean, dtype=np.float64)
        self.std = np.asarray(std, dtype=np.float64)

    def __call__(self, values: Values, valid: Valid) -> Values:
        if len(values) != len(self.mean):
            raise DataError(
                f"statistics: found {len(self.mean)} bands; expected {len(values)}, the image's"
            )
        width = 4.0 * np.where(self.std > 0, self.std, 1.0)
        low = (self.mean - 2.0 * self.std).astype(np.float32)[:, None, None]
        scaled = (values - low) * (1.0 / width).astype(np.float32)[:, None, None]
        return np.where(valid, np.clip(scaled, 0.0, 1.0), np.float32(0.0))


class _Statistics:
    """Running count, mean and sum of squared deviations a band (Chan's pairwise update)."""

    def __init__(self, bands: int) -> None:
        self.count = np.zeros(bands)
        self.mean = np.zeros(bands)
        self.squares = np.zeros(bands)

    def add(self, values: Values, valid: Valid) -> None:
        count = valid.sum(axis=(1, 2)).astype(np.float64)
        kept = np.where(valid, values.astype(np.float64), 0.0)
        mean = kept.sum(axis=(1, 2)) / np.maximum(count, 1)
        squares = np.where(valid, (kept - mean[:, None, None]) ** 2, 0.0).sum(axis=(1, 2))
        total = self.count + count
        share = count / np.maximum(total, 1)
        step = mean - self.mean
        self.squares += squares + step**2 * self.count * share
        self.mean += step * share
        self.count = total


def fit_statistics(images: Sequence[tuple[Values, Valid]] | _Images) -> FixedStatistics:
    """Mean and standard deviation a band over all valid values of `images`, read one at a time.

    `images` is anything with a length that gives (values [C, H, W], valid [C, H, W]) by index,
    such as ``TileDataset.raw``.
    """
    statistics: _Statistics | None = None
    for index in range(len(images)):
        values, valid = images[index]
        if statistics is None:
            statistics = _Statistics(len(values))
        statistics.add(values, valid)
    if statistics is None:
        raise data_error("statistics", "no image", "at least one image to measure them on")
    deviation = np.sqrt(statistics.squares / np.maximum(statistics.count, 1))
    return FixedStatistics(statistics.mean.tolist(), deviation.tolist())


class _Images(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Values, Valid]: ...
