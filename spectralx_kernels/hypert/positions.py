"""Fixed sine-cosine tables of where a position lies and which wavelength a channel stands for.

They are made on the CPU, whatever the default device and dtype. Frequencies, angles, sines and
cosines are rounded to float32, as in the published implementation: at 2000 nm the rounding of an
angle is 1e-4, far above that of anything after it, and published weights were trained on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

WAVELENGTH_UNITS = {"um": 1000.0, "nm": 1.0}  # nanometres in one of them
WAVELENGTH_RANGE_NM = (100.0, 100_000.0)  # ultraviolet to thermal infrared


def _count(stop: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.arange(stop, dtype=dtype, device="cpu")


def sincos(values: Tensor, width: int) -> Tensor:
    """[P, width] in float64: sines of value · 10000^(-2i / width), then the cosines.

    values : [P], in float64. An odd width has one sine more than cosines. Every step is rounded
    to float32.
    """
    sines = (width + 1) // 2
    frequencies = 1.0 / 10000.0 ** (_count(sines, torch.float32) / (width / 2))
    angles = values.to(torch.float32)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()[:, : width - sines]], dim=1)
    return table.to(torch.float64)


def spatial_positions(height: int, width: int, channels: int, resolution: float) -> Tensor:
    """[height * width, channels] in float64, row-major; `channels` is a multiple of 4.

    The first half of the channels holds the column, the second the row, each times `resolution`
    (metres).
    """
    columns = sincos(resolution * _count(width), channels // 2)
    rows = sincos(resolution * _count(height), channels // 2)
    return torch.cat(
        [columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)],
        dim=1,
    )


def spectral_positions(wavelengths_nm: Tensor, channels: int, width: int) -> Tensor:
    """[channels, width] in float64 from wavelengths [C] in nanometres, in any order.

    The table of the C bands, interpolated linearly along the band index to `channels` points
    that span it from the first band to the last.
    """
    table = sincos(wavelengths_nm, width)
    bands = table.shape[0]
    if bands == 1:
        return table.repeat(channels, 1)
    where = torch.linspace(0, bands - 1, channels, dtype=torch.float64, device="cpu")
    below = where.floor().clamp(max=bands - 2)
    weight = (where - below)[:, None]
    index = below.long()
    return (1 - weight) * table[index] + weight * table[index + 1]


@lru_cache(maxsize=16)
def _tables(
    wavelengths_nm: tuple[float, ...], size: tuple[int, int], channels: int, resolution: float,
    device: torch.device, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    nanometres = torch.tensor(wavelengths_nm, dtype=torch.float64, device="cpu")
    height, width = size
    spatial = spatial_positions(height, width, channels, resolution)
    spectral = spectral_positions(nanometres, channels, height * width)
    return spatial.to(device, dtype), spectral.to(device, dtype)


def position_tables(
    wavelengths_nm: Tensor, size: tuple[int, int], channels: int, resolution: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """`spatial_positions` and `spectral_positions` on the device and in the dtype of `like`.

    Made once for the same arguments, and then shared: not to be written to.
    """
    wavelengths = tuple(wavelengths_nm.tolist())
    return _tables(wavelengths, size, channels, resolution, like.device, like.dtype)


def wavelengths_in_nm(wavelengths: Sequence[float] | Tensor, unit: str, bands: int) -> Tensor:
    """[bands] in float64 and nanometres; unsorted and repeated wavelengths are fine.

    Raises
    ------
    ValueError : unknown unit, another number of wavelengths than `bands`, or a wavelength that is
        not finite or outside 0.1 to 100 micrometres.
    """
    if unit not in WAVELENGTH_UNITS:
        expected = ", ".join(WAVELENGTH_UNITS)
        raise ValueError(f"wavelength_unit: got {unit!r}, expected one of {expected}")
    values = torch.as_tensor(wavelengths, dtype=torch.float64, device="cpu")
    if values.shape != (bands,):
        raise ValueError(
            f"wavelengths: got shape {list(values.shape)}, expected one for each of {bands} bands"
        )
    low, high = (edge / WAVELENGTH_UNITS[unit] for edge in WAVELENGTH_RANGE_NM)
    for position, value in enumerate(values.tolist()):
        if not low <= value <= high:
            raise ValueError(
                f"wavelengths: got {value} at band {position}, expected {low} to {high} {unit}"
            )
    return values * WAVELENGTH_UNITS[unit]
