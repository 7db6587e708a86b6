"""A tokenizer for other bands than it was trained on; shared position tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectralx_kernels.hypert import HyperT, SpatialSpectralTokenizer
from spectralx_kernels.hypert.bands import resampling

SMALL: dict[str, Any] = {
    "embed_dim": 12, "stem_dim": 16, "num_heads": 4, "image_size": (32, 16),
}  # fmt: skip


def small(wavelengths: list[float]) -> HyperT:
    torch.manual_seed(0)
    return HyperT(len(wavelengths), wavelengths, **SMALL).eval()


def test_shares():
    found = resampling([0.4, 0.5, 0.6, 0.6, 0.9], [0.6, 0.45, 0.55, 0.6])
    expected = [
        [0, 1, 0, 0],  # below the first: held
        [0, 0.5, 0.5, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 1],
        [0.5, 0, 0, 0.5],  # beyond the last, of which there are two
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(resampling([1.0, 1.0, 2.0], [1.0, 2.0])[:2, 0], torch.ones(2).double())


def test_reordered_bands_are_a_permutation():
    wavelengths = [0.4, 0.6, 0.5, 0.6]
    model, order = small(wavelengths), [3, 0, 2, 1]
    # Of two bands at one wavelength the first stays the first.
    changed = model.for_bands([wavelengths[i] for i in [1, 0, 2, 3]])
    x = torch.rand(2, 4, 32, 16)
    for found, expected in zip(changed(x[:, [1, 0, 2, 3]]), model(x), strict=True):
        torch.testing.assert_close(found, expected)
    assert resampling([0.4, 0.6, 0.5, 0.6], [wavelengths[i] for i in order]).sum() == 4


@pytest.mark.parametrize("kept", [[0, 2, 3], [1]])
def test_dropped_bands_are_interpolated(kept):
    """The same as the whole tokenizer on the spectrum interpolated from the bands left."""
    wavelengths = [0.4, 0.5, 0.7, 0.8]
    model = small(wavelengths)
    changed = model.for_bands([wavelengths[i] for i in kept])
    x = torch.rand(2, 4, 32, 16)[:, kept]
    whole = torch.einsum(
        "tn,bnyx->btyx", resampling(wavelengths, [wavelengths[i] for i in kept]).float(), x
    )
    for found, expected in zip(changed(x), model(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_another_sensor_and_what_is_shared():
    model = small([0.45, 0.55, 0.65])
    constant = torch.full((1, 3, 32, 16), 0.3)
    changed = model.for_bands([1500 - 10 * i for i in range(100)], wavelength_unit="nm")
    found = changed(constant[:, :1].expand(1, 100, 32, 16))
    for one, two in zip(found, model(constant), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert changed.up.weight is model.up.weight
    assert changed.proj.spa_query is model.proj.spa_query
    assert changed.proj.spectral_positions is model.proj.spectral_positions
    assert not changed.training
    assert changed.down.weight.shape == (16, 100, 4, 4)
    assert not changed.down.weight.requires_grad
    # The tokenizer it came from is as it was, and so is the way back.
    assert model.proj.in_channels == 3
    assert model.down.weight.requires_grad
    bare = SpatialSpectralTokenizer(3, [0.45, 0.55, 0.65], **SMALL)
    assert bare.for_bands([0.5]).in_channels == 1


@pytest.mark.parametrize(
    ("wavelengths", "message"),
    [([], "bands of wavelengths: got 0"), ([500.0], "wavelengths: got 500.0 at band 0"),
     ([0.5] * 513, "bands of wavelengths: got 513")],
)  # fmt: skip
def test_bad_bands(wavelengths, message):
    with pytest.raises(ValueError, match=message):
        small([0.5]).for_bands(wavelengths)


def test_position_tables_are_made_once():
    one, two = small([0.4, 0.5]), small([0.4, 0.5])
    assert one.proj.spectral_positions is two.proj.spectral_positions
    assert one.proj.spatial_positions is two.proj.spatial_positions
    other = small([0.4, 0.6])
    assert not torch.equal(other.proj.spectral_positions, one.proj.spectral_positions)
