"""Scaling of pixel values before the model sees them.

``"image"`` is the paper's: each band of each image to [0, 1] by its own minimum and maximum.
``"fixed"`` uses one mean and deviation a band, measured once over the training files of the
source domain, so that absolute reflectance survives. Missing values take no part in any statistic
and are 0 afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .raster import DataError, data_error

NORMALISATIONS = ("image", "fixed")

Values = npt.NDArray[np.float32]
Valid = npt.NDArray[np.bool_]


class Normalisation(Protocol):
    """Values [C, H, W] and their validity [C, H, W] to values [C, H, W], 0 where invalid."""

    def __call__(self, values: Values, valid: Valid) -> Values: ...


@dataclass(frozen=True)
class Scaling:
    """(value - low) * inverse, clipped to [0, 1] if `clipped`; low and inverse float32 [C]."""

    low: Values
    inverse: Values
    clipped: bool

    def __call__(self, values: Values, valid: Valid) -> Values:
        scaled = (values - self.low[:, None, None]) * self.inverse[:, None, None]
        if self.clipped:
            scaled = np.clip(scaled, 0.0, 1.0)
        return np.where(valid, scaled, np.float32(0.0))


class ImageMinMax:
    """Each band to [0, 1] by the minimum and maximum of its valid values; a flat band becomes 0."""

    @staticmethod
    def scaling(low: Values, high: Values) -> Scaling:
        """Of an image whose bands reach from `low` to `high` [C]; infinite where none is valid."""
        span = high - low
        usable = np.isfinite(span) & (span > 0)
        inverse = np.where(usable, 1.0 / np.where(usable, span, 1.0), 0.0)
        return Scaling(
            np.where(usable, low, 0.0).astype(np.float32), inverse.astype(np.float32), False
        )

    def __call__(self, values: Values, valid: Valid) -> Values:
        low, high = extremes(values, valid)
        return self.scaling(low, high)(values, valid)


def extremes(values: Values, valid: Valid) -> tuple[Values, Values]:
    """Smallest and largest valid value of each band [C] of values [C, H, W]; (inf, -inf) without
    any."""
    complete = bool(valid.all())
    low = (values if complete else np.where(valid, values, np.inf)).min((1, 2))
    high = (values if complete else np.where(valid, values, -np.inf)).max((1, 2))
    return low.astype(np.float32), high.astype(np.float32)


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
        return self.scaling()(values, valid)

    def scaling(self) -> Scaling:
        """As a shift and a factor for each band."""
        width = 4.0 * np.where(self.std > 0, self.std, 1.0)
        low = (self.mean - 2.0 * self.std).astype(np.float32)
        return Scaling(low, (1.0 / width).astype(np.float32), True)


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


def restore_normalisation(described: Mapping[str, Any]) -> ImageMinMax | FixedStatistics:
    """The scaling that a checkpoint describes (`spectralx.datamodule.describe_normalisation`)."""
    if described["kind"] == "fixed":
        return FixedStatistics(described["mean"], described["std"])
    return ImageMinMax()
