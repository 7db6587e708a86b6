"""Scaling of pixel values before the model sees them.

``"image"`` is the paper's: each band of each image to [0, 1] by its own minimum and maximum.
``"fixed"`` uses one mean and deviation a band, measured once over the training files of the
source domain, so that absolute reflectance survives. ``"whitened"`` also takes the correlation of
the bands away, measured over the same files: neighbouring bands of a hyperspectral sensor are
nearly the same, and what tells materials apart is what is left. Missing values take no part in any
statistic and are 0 afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .raster import DataError, data_error

NORMALISATIONS = ("image", "fixed", "whitened")
# Share of the identity in the correlation of bands that is taken away: directions that vary less
# than this are noise, and are not blown up to the size of the others.
SHRINKAGE = 0.01

Values = npt.NDArray[np.float32]
Valid = npt.NDArray[np.bool_]


class Normalisation(Protocol):
    """Values [C, H, W] and their validity [C, H, W] to values [C, H, W], 0 where invalid."""

    def __call__(self, values: Values, valid: Valid) -> Values: ...


@dataclass(frozen=True)
class Scaling:
    """(value - low) * inverse, clipped to [0, 1] if `clipped`; low and inverse float32 [C].

    With `mixing`, float32 [C, C], each band then becomes the sum over bands of its row of
    weights times their scaled values, to which missing ones add nothing.
    """

    low: Values
    inverse: Values
    clipped: bool
    mixing: Values | None = None

    def __call__(self, values: Values, valid: Valid) -> Values:
        scaled = (values - self.low[:, None, None]) * self.inverse[:, None, None]
        if self.clipped:
            scaled = np.clip(scaled, 0.0, 1.0)
        scaled = np.where(valid, scaled, np.float32(0.0))
        if self.mixing is None:
            return scaled
        return np.where(valid, np.tensordot(self.mixing, scaled, axes=1), np.float32(0.0))


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
        self.check(len(values))
        return self.scaling()(values, valid)

    def check(self, bands: int) -> None:
        """Raise DataError for an image of another number of bands."""
        if bands != len(self.mean):
            raise DataError(
                f"statistics: found {len(self.mean)} bands; expected {bands}, the image's"
            )

    def scaling(self) -> Scaling:
        """As a shift and a factor for each band."""
        width = 4.0 * np.where(self.std > 0, self.std, 1.0)
        low = (self.mean - 2.0 * self.std).astype(np.float32)
        return Scaling(low, (1.0 / width).astype(np.float32), True)


class Whitened:
    """Bands without their mean, of variance 1 on average, uncorrelated but for some shrinkage.

    The weights are symmetric (zero-phase whitening), so that of all bands each stays nearest to
    itself, and keeps its wavelength.

    Parameters
    ----------
    mean, std : one number a band, in the units of the files.
    mixing : [C, C], row by row: weights that make each band of the scaled ones.

    Source: Kessy, Lewin, Strimmer, "Optimal whitening and decorrelation", 2018 (ZCA-cor).
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], mixing: Sequence[Sequence[float]]
    ) -> None:
        self.statistics = FixedStatistics(mean, std)
        self.mixing = np.asarray(mixing, dtype=np.float32)
        if self.mixing.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mixing: found shape {list(self.mixing.shape)}; expected {len(mean)} rows of "
                f"{len(mean)}, as many as mean"
            )

    def __call__(self, values: Values, valid: Valid) -> Values:
        self.statistics.check(len(values))
        return self.scaling()(values, valid)

    def scaling(self) -> Scaling:
        """As a shift and a factor for each band, and the weights of bands."""
        std = self.statistics.std
        inverse = (1.0 / np.where(std > 0, std, 1.0)).astype(np.float32)
        return Scaling(self.statistics.mean.astype(np.float32), inverse, False, self.mixing)


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


def fit_whitening(
    images: Sequence[tuple[Values, Valid]] | _Images, *, shrinkage: float = SHRINKAGE
) -> Whitened:
    """Whitening by all pixels of `images` whose bands are all valid, read one image at a time.

    The correlation matrix R of the bands becomes (1 - shrinkage) R + shrinkage I, and the weights
    are its inverse square root, times what makes the mean variance of the bands 1. A band that
    never changes stays apart from the others.

    Parameters
    ----------
    images : as of `fit_statistics`.
    shrinkage : 0 to 1, 0 excluded; at 1 bands keep their correlation.

    Raises
    ------
    ValueError : a shrinkage out of range.
    DataError : fewer than two pixels are valid in all bands.
    """
    if not 0.0 < shrinkage <= 1.0:
        raise ValueError(f"shrinkage: found {shrinkage}; expected more than 0, at most 1")
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for index in range(len(images)):
        values, valid = images[index]
        pixels = values[:, valid.all(axis=0)].astype(np.float64)  # [C, valid pixels]
        if not count:
            mean, scatter = np.zeros(len(values)), np.zeros((len(values), len(values)))
        found = pixels.shape[1]
        if not found:
            continue
        step = pixels.mean(axis=1) - mean
        pixels -= (mean + step)[:, None]
        total = count + found
        scatter += pixels @ pixels.T + np.outer(step, step) * (count * found / total)
        mean = mean + step * (found / total)
        count = total
    if count < 2:
        raise data_error("statistics", f"{count} pixels valid in all bands", "two or more")
    std = np.sqrt(np.diag(scatter) / count)
    scale = np.where(std > 0, std, 1.0)
    correlation = scatter / count / np.outer(scale, scale)
    mixed = (1.0 - shrinkage) * correlation + shrinkage * np.eye(len(std))
    spread, axes = np.linalg.eigh(mixed)
    mixing = (axes / np.sqrt(spread)) @ axes.T
    # Shrunk directions leave little: what is left gets the variance of as many scaled bands.
    mixing *= np.sqrt(np.trace(correlation) / np.einsum("ij,jk,ik->", mixing, correlation, mixing))
    mixing[:, std == 0] = mixing[std == 0] = 0.0
    return Whitened(mean.tolist(), std.tolist(), mixing.tolist())


class _Images(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Values, Valid]: ...


# Those with statistics of the training images, and all that a checkpoint can keep.
MeasuredNormalisation = FixedStatistics | Whitened
AnyNormalisation = ImageMinMax | MeasuredNormalisation


def describe(normalisation: AnyNormalisation) -> dict[str, Any]:
    """What `restore_normalisation` makes it of again: names, numbers and lists."""
    if isinstance(normalisation, ImageMinMax):
        return {"kind": "image"}
    fixed = (
        normalisation if isinstance(normalisation, FixedStatistics) else normalisation.statistics
    )
    described = {"kind": "fixed", "mean": fixed.mean.tolist(), "std": fixed.std.tolist()}
    if isinstance(normalisation, Whitened):
        # To nine digits, which hold a float32.
        mixing = [[float(f"{value:.9g}") for value in row] for row in normalisation.mixing.tolist()]
        described |= {"kind": "whitened", "mixing": mixing}
    return described


def restore_normalisation(described: Mapping[str, Any]) -> AnyNormalisation:
    """The scaling that a checkpoint describes (`describe`)."""
    if described["kind"] == "whitened":
        return Whitened(described["mean"], described["std"], described["mixing"])
    if described["kind"] == "fixed":
        return FixedStatistics(described["mean"], described["std"])
    return ImageMinMax()
