"""Sine-cosine tables of positions and wavelengths."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralx_kernels.hypert.positions import (
    sincos,
    spatial_positions,
    spectral_positions,
    wavelengths_in_nm,
)


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_sincos_is_its_formula(width):
    table = sincos(torch.tensor([0.0, 3.5, 700.0]), width)
    sines = (width + 1) // 2
    for row, value in enumerate((0.0, 3.5, 700.0)):
        for index in range(width):
            i = index % sines if index >= sines else index
            angle = value * 10000 ** (-2 * i / width)
            expected = math.sin(angle) if index < sines else math.cos(angle)
            # Angles are rounded to float32.
            assert table[row, index].item() == pytest.approx(expected, abs=3e-7 * max(value, 1))


def test_spatial_positions_hold_columns_then_rows():
    table = spatial_positions(3, 4, 8, 10.0).view(3, 4, 8)
    assert torch.equal(table[..., :4], table[:1, :, :4].expand(3, 4, 4))
    assert torch.equal(table[..., 4:], table[:, :1, 4:].expand(3, 4, 4))
    torch.testing.assert_close(table[2, 1, :4], sincos(torch.tensor([10.0]), 4)[0])
    torch.testing.assert_close(table[2, 1, 4:], sincos(torch.tensor([20.0]), 4)[0])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(bands=st.integers(1, 20), channels=st.integers(2, 24), width=st.integers(1, 6))
def test_spectral_positions_interpolate_along_the_band_index(bands, channels, width):
    nanometres = torch.linspace(2000, 400, bands, dtype=torch.float64)
    table = sincos(nanometres, width)
    expected = F.interpolate(table.T[None], size=channels, mode="linear", align_corners=True)
    torch.testing.assert_close(spectral_positions(nanometres, channels, width), expected[0].T)


def test_units_agree():
    micrometres = wavelengths_in_nm([0.49, 0.443, 0.443], "um", 3)
    nanometres = wavelengths_in_nm(torch.tensor([490, 443, 443]), "nm", 3)
    torch.testing.assert_close(micrometres, nanometres)


@pytest.mark.parametrize(
    ("wavelengths", "unit", "message"),
    [
        ([0.4, 0.5], "um", r"wavelengths: got shape \[2\], expected one for each of 3 bands"),
        ([0.4, 0.5, 443.0], "um", "wavelengths: got 443.0 at band 2, expected 0.1 to 100.0 um"),
        ([0.4, 0.5, 0.6], "nm", "wavelengths: got 0.4 at band 0, expected 100.0 to"),
        ([0.4, math.nan, 0.6], "um", "wavelengths: got nan at band 1"),
        ([0.4, 0.5, 0.6], "mm", "wavelength_unit: got 'mm', expected one of um, nm"),
    ],
)
def test_bad_wavelengths(wavelengths, unit, message):
    with pytest.raises(ValueError, match=message):
        wavelengths_in_nm(wavelengths, unit, 3)
