"""Reflectance of pure materials over wavelength, 0.4 to 2.5 µm.

Smooth closed forms with the features that sensors in this range see: chlorophyll absorption and
red edge, liquid-water bands at 0.97, 1.2, 1.45 and 1.94 µm, iron oxide below 0.6 and at 0.88 µm,
clay at 2.2 µm, cellulose at 2.1 µm. All take wavelengths [C] in µm and return reflectance [C].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Spectrum = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Leaves:
    """Green foliage: relative chlorophyll, plateau reflectance at 0.8 µm, relative water."""

    chlorophyll: float = 1.0
    plateau: float = 0.45
    water: float = 1.0


@dataclass(frozen=True)
class Soil:
    """Bare soil: reflectance at 1.6 µm when dry, relative iron oxide, clay and moisture."""

    brightness: float = 0.30
    iron: float = 0.5
    clay: float = 0.5
    moisture: float = 0.2


@dataclass(frozen=True)
class Water:
    """Open water: relative sediment and relative algae."""

    sediment: float = 0.2
    algae: float = 0.2


@dataclass(frozen=True)
class Roofs:
    """Built surfaces: reflectance of concrete and of asphalt, redness of tiles (0 grey to 1)."""

    concrete: float = 0.26
    asphalt: float = 0.10
    redness: float = 0.6


def leaves(wavelengths: Spectrum, kind: Leaves) -> Spectrum:
    """Green foliage."""
    chlorophyll = max(kind.chlorophyll, 0.05)
    green = 0.085 / chlorophyll**0.7 * _bell(wavelengths, 0.552, 0.038)
    visible = 0.022 + 0.025 / chlorophyll + green
    edge = _step(wavelengths, 0.710 + 0.009 * min(chlorophyll, 2.0), 0.012)
    infrared = kind.plateau * (1.0 + 0.12 * np.clip(wavelengths - 0.8, 0.0, 0.4))
    infrared *= _liquid_water(wavelengths, kind.water)
    canopy: Spectrum = visible * (1.0 - edge) + infrared * edge
    return canopy


def dry_plants(wavelengths: Spectrum) -> Spectrum:
    """Straw, litter and leafless stems."""
    ramp = 0.05 + 0.34 * (1.0 - np.exp(-(wavelengths - 0.38) / 0.38))
    cellulose = 0.20 * _bell(wavelengths, 2.10, 0.06) + 0.08 * _bell(wavelengths, 1.73, 0.03)
    return ramp * np.exp(-cellulose) * _liquid_water(wavelengths, 0.15)


def soil(wavelengths: Spectrum, kind: Soil) -> Spectrum:
    """Bare soil: rises with wavelength, bent down by iron oxide, clay and moisture."""
    slope = kind.brightness * (1.0 - np.exp(-(wavelengths - 0.28) / 0.42)) / 0.957
    iron = kind.iron * (
        0.9 * _step(-wavelengths, -0.56, 0.03) + 0.22 * _bell(wavelengths, 0.88, 0.06)
    )
    clay = kind.clay * 0.18 * _bell(wavelengths, 2.20, 0.03)
    wet = np.exp(-0.7 * kind.moisture) * _liquid_water(wavelengths, 0.7 * kind.moisture)
    reflectance: Spectrum = slope * np.exp(-iron - clay) * wet
    return reflectance


def water(wavelengths: Spectrum, kind: Water) -> Spectrum:
    """Open water: little beyond 0.75 µm, more and redder the more sediment it carries."""
    clear = 0.045 * np.exp(-(wavelengths - 0.40) / 0.10)
    algae = 0.035 * kind.algae * _bell(wavelengths, 0.56, 0.04)
    fall = _step(-wavelengths, -(0.66 + 0.10 * kind.sediment), 0.035)
    sediment = 0.13 * kind.sediment * (0.25 + 0.75 * _bell(wavelengths, 0.58, 0.11))
    return (
        0.004
        + clear
        + algae
        + sediment * (0.12 + 0.88 * fall) * np.exp(-6.0 * (wavelengths - 0.75).clip(0.0))
    )


def concrete(wavelengths: Spectrum, kind: Roofs) -> Spectrum:
    """Concrete and stone: nearly flat."""
    return kind.concrete * (0.72 + 0.28 * (1.0 - np.exp(-(wavelengths - 0.38) / 0.25)))


def asphalt(wavelengths: Spectrum, kind: Roofs) -> Spectrum:
    """Asphalt and dark roofing: dark, flat, rising slowly."""
    return kind.asphalt * (0.85 + 0.20 * (wavelengths - 0.4))


def tiles(wavelengths: Spectrum, kind: Roofs) -> Spectrum:
    """Clay tiles: the step of iron oxide at 0.58 µm, as strong as they are red."""
    red = 0.06 + 0.26 * _step(wavelengths, 0.585, 0.022) * (
        1 - 0.15 * _bell(wavelengths, 0.87, 0.07)
    )
    return kind.redness * red + (1.0 - kind.redness) * 0.17


def metal(wavelengths: Spectrum) -> Spectrum:
    """Coated metal roofs of works and halls: bright, bluish."""
    return 0.40 + 0.16 * _bell(wavelengths, 0.47, 0.06) - 0.05 * (wavelengths - 0.4)


def salt(wavelengths: Spectrum) -> Spectrum:
    """Salt crust: bright through the visible, moist."""
    return 0.46 * (1.0 - 0.5 * np.exp(-(wavelengths - 0.3) / 0.1)) * _liquid_water(wavelengths, 0.5)


def sand(wavelengths: Spectrum) -> Spectrum:
    """Quartz sand: bright and yellow."""
    return soil(wavelengths, Soil(brightness=0.52, iron=0.55, clay=0.1, moisture=0.0))


def rock(wavelengths: Spectrum) -> Spectrum:
    """Grey gravel and rock."""
    return 0.17 + 0.05 * (1.0 - np.exp(-(wavelengths - 0.38) / 0.5))


def snow(wavelengths: Spectrum) -> Spectrum:
    """Snow: near 0.9 in the visible, dark in the short-wave infrared."""
    grains = 0.06 + 0.85 * _step(-wavelengths, -1.25, 0.12)
    return grains * (1.0 - 0.10 * _bell(wavelengths, 1.03, 0.05))


def shade(wavelengths: Spectrum) -> Spectrum:
    """Shadow: skylight only, bluish."""
    return 0.004 + 0.016 * np.exp(-(wavelengths - 0.4) / 0.25)


# Materials with no parameters of their own.
FIXED: dict[str, Callable[[Spectrum], Spectrum]] = {
    "dry": dry_plants,
    "metal": metal,
    "salt": salt,
    "sand": sand,
    "rock": rock,
    "snow": snow,
    "shade": shade,
}


def _bell(wavelengths: Spectrum, centre: float, width: float) -> Spectrum:
    return np.exp(-(((wavelengths - centre) / width) ** 2))


def _step(wavelengths: Spectrum, centre: float, width: float) -> Spectrum:
    rising: Spectrum = 1.0 / (1.0 + np.exp(-((wavelengths - centre) / width).clip(-60.0, 60.0)))
    return rising


def _liquid_water(wavelengths: Spectrum, amount: float) -> Spectrum:
    """Transmittance of the liquid water in a medium, 1 without water."""
    bands = (
        0.05 * _bell(wavelengths, 0.97, 0.03)
        + 0.14 * _bell(wavelengths, 1.20, 0.05)
        + 1.40 * _bell(wavelengths, 1.45, 0.07)
        + 1.90 * _bell(wavelengths, 1.94, 0.10)
        + 0.55 * _step(wavelengths, 1.36, 0.03)
        + 0.75 * _step(wavelengths, 1.85, 0.03)
    )
    return np.exp(-amount * bands)
