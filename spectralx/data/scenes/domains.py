"""What differs between domains: the region's soils, plants and towns, the date, sun, haze, sensor.

A domain is a :class:`Region` seen by one :class:`Sensor` at one or several :class:`Acquisition`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .spectra import Leaves, Roofs, Soil, Water


@dataclass(frozen=True)
class Season:
    """Yearly course of one kind of plant: greenness 0 to 1 over the day of the year.

    Rises around day `rise` and falls around day `fall`, both over some weeks; `least` and `most`
    bound it. ``rise > fall`` is a plant that grows through the winter.
    """

    rise: float
    fall: float
    least: float = 0.05
    most: float = 0.95

    def greenness(self, day: float) -> float:
        """Greenness at `day` (1 to 365)."""
        up = _rise(day - self.rise)
        down = _rise(day - self.fall)
        share = up - down if self.rise <= self.fall else 1.0 - (down - up)
        return self.least + (self.most - self.least) * share


@dataclass(frozen=True)
class Sensor:
    """An instrument: band centres in µm, digital numbers a unit of reflectance, pixel size in m.

    `stripes` is the relative spread between detector columns (push-broom); `top_of_atmosphere`
    tells that products keep molecular scattering and gas absorption.
    """

    wavelengths: tuple[float, ...]
    scale: float = 10000.0
    pixel: float = 10.0
    stripes: float = 0.0
    top_of_atmosphere: bool = False


@dataclass(frozen=True)
class Acquisition:
    """A date and its light: day of the year, sun elevation and azimuth in degrees, haze.

    `haze` is the aerosol optical depth at 0.55 µm; `gain` and `tilt` the relative error of the
    calibration at 0.8 µm and its change a µm; `noise` the standard deviation in reflectance;
    `snow` the share of open ground under snow.
    """

    day: float
    elevation: float = 60.0
    azimuth: float = 145.0
    haze: float = 0.08
    gain: float = 0.0
    tilt: float = 0.0
    noise: float = 0.004
    snow: float = 0.0


@dataclass(frozen=True)
class Region:
    """A place: what its ground is made of, what grows when, and how much there is of what.

    ``zones`` weighs the kinds of zones of :mod:`spectralx.data.scenes.landscape`; ``river`` and
    ``lake`` are the chances that a tile has one; ``relief`` scales the slopes.
    """

    seasons: Mapping[str, Season]
    zones: Mapping[str, float]
    soil: Soil = field(default_factory=Soil)
    tree: Leaves = field(default_factory=Leaves)
    needle: Leaves = field(default_factory=lambda: Leaves(chlorophyll=1.5, plateau=0.28, water=0.8))
    crop: Leaves = field(default_factory=lambda: Leaves(chlorophyll=1.1, plateau=0.52))
    grass: Leaves = field(default_factory=lambda: Leaves(chlorophyll=0.7, plateau=0.40, water=0.7))
    river: Water = field(default_factory=lambda: Water(sediment=0.5, algae=0.2))
    lake: Water = field(default_factory=lambda: Water(sediment=0.3, algae=0.4))
    roofs: Roofs = field(default_factory=Roofs)
    rivers: float = 0.5
    lakes: float = 0.5
    relief: float = 1.0
    epsg: int = 32650


@dataclass(frozen=True)
class Domain:
    """A region seen by a sensor on one or several dates, stacked date by date."""

    region: Region
    sensor: Sensor
    dates: tuple[Acquisition, ...]


def _rise(days: float) -> float:
    return float(1.0 / (1.0 + np.exp(-days / 10.0)))
