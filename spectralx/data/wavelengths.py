"""Wavelengths that the bands of a raster state: in their descriptions, or in their tags."""

from __future__ import annotations

import re
from typing import Any

_UNITS = {"nm": 1e-3, "nanometer": 1e-3, "um": 1.0, "µm": 1.0, "μm": 1.0, "micrometer": 1.0,
          "micron": 1.0}  # fmt: skip
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_WITH_UNIT = re.compile(
    _NUMBER + r"\s*(nanomet(?:er|re)|micromet(?:er|re)|micron|nm|um|µm|μm)s?\b", re.I
)
_BARE = re.compile(r"\s*" + _NUMBER + r"\s*")
# A bare number above this is taken for nanometres: optical sensors end below 100 µm.
_LARGEST_MICROMETRE = 100.0


def parse_wavelength(text: str) -> float | None:
    """Wavelength in µm stated by a band description, or None.

    Understands a number with its unit anywhere in the text (``"band 1 (418.24 Nanometers)"``,
    ``"0.466 um"``), or a number alone (taken for nanometres above 100, else for µm).
    """
    with_unit = _WITH_UNIT.search(text)
    if with_unit is not None:
        unit = with_unit.group(2).lower().replace("metre", "meter")
        return float(with_unit.group(1)) * _UNITS[unit]
    bare = _BARE.fullmatch(text)
    if bare is None:
        return None
    value = float(bare.group(1))
    return value * 1e-3 if value > _LARGEST_MICROMETRE else value


def wavelengths_of(source: Any) -> tuple[float, ...] | None:
    """Wavelengths in µm from the bands' descriptions, else from their tags (ENVI's, GDAL's)."""
    found: list[float] = []
    for band, description in enumerate(source.descriptions, start=1):
        value = parse_wavelength(description) if description else None
        if value is None:
            tags = {key.lower(): text for key, text in source.tags(band).items()}
            imagery = source.tags(band, ns="IMAGERY").get("CENTRAL_WAVELENGTH_UM")
            if imagery is not None:
                value = parse_wavelength(f"{imagery} um")
            elif "wavelength" in tags:
                unit = tags.get("wavelength_units", tags.get("wavelength_unit", ""))
                value = parse_wavelength(f"{tags['wavelength']} {unit}".strip())
        if value is None:
            return None
        found.append(value)
    return tuple(found)
