from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spectralx.cli import InputError
from spectralx.data import FixedStatistics, Whitened
from spectralx.prediction.bands import (
    choose_bands,
    for_bands,
    match_bands,
    normalisation_for_bands,
)
from tests.spectralx.prediction.scenes import SIDE, build_model

SCENE = Path("scene.tif")


def test_bands_are_matched_by_wavelength() -> None:
    model = [0.48, 0.56, 0.842]
    assert match_bands([0.483, 0.556, 0.842], model) == [0, 1, 2]
    assert match_bands([0.842, 0.6, 0.56, 0.48, 2.2], model) == [3, 2, 0]
    assert match_bands([0.48, 0.56, 0.8], model) is None
    # 1 % at 2.19 um: the same band of two satellites.
    assert match_bands([2.202], [2.19]) == [0]
    # Repeated wavelengths (several dates) in the order they come.
    assert match_bands([0.48, 0.56, 0.48, 0.56], [0.56, 0.48, 0.56, 0.48]) == [1, 0, 3, 2]
    assert match_bands([], [0.48]) is None


def test_scenes_that_state_nothing_need_the_same_number() -> None:
    assert choose_bands(SCENE, 3, None, [0.48, 0.56, 0.842], 3) == [0, 1, 2]
    with pytest.raises(InputError, match=r"scene\.tif: found 4 bands without wavelengths"):
        choose_bands(SCENE, 4, None, [0.48, 0.56, 0.842], 3)
    with pytest.raises(InputError, match=r"found 3 bands; expected 2, as wavelengths"):
        choose_bands(SCENE, 3, [0.48, 0.56], [0.48, 0.56], 2)
    with pytest.raises(InputError, match=r"none for 0\.842 um; expected .*adapt_bands"):
        choose_bands(SCENE, 3, [0.48, 0.56, 1.6], [0.48, 0.56, 0.842], 3)


def test_a_model_for_other_bands_shares_all_but_what_sees_them() -> None:
    model = build_model()
    order = [3, 0, 4, 1, 2]
    trained = model.config["wavelengths"]
    other = for_bands(model, [trained[band] for band in order])
    images = torch.rand(1, 5, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Sums run over the bands in another order.
        torch.testing.assert_close(other(images[:, order]), model(images), rtol=1e-4, atol=1e-4)
        wider = for_bands(model, np.linspace(0.4, 1.8, 9).tolist())
        assert wider(torch.rand(1, 9, SIDE, SIDE)).shape == model(images).shape
    assert model.in_channels == 5
    own = {id(tensor) for tensor in model.parameters()}
    apart = [name for name, tensor in wider.named_parameters() if id(tensor) not in own]
    assert apart
    assert all("conv1" in name or "down" in name for name in apart)
    with pytest.raises(InputError, match="patch convolution; expected one with HyperT"):
        for_bands(build_model(tokenizer="conv"), trained)


def test_statistics_follow_the_wavelengths() -> None:
    fixed = FixedStatistics([100.0, 300.0, 200.0], [10.0, 30.0, 20.0])
    changed = normalisation_for_bands(fixed, [0.5, 0.7, 0.6], [0.55, 0.4, 0.7])
    assert isinstance(changed, FixedStatistics)
    assert changed.mean.tolist() == pytest.approx([150.0, 100.0, 300.0])
    assert changed.std.tolist() == pytest.approx([15.0, 10.0, 30.0])


def test_whitening_is_of_the_bands_it_was_measured_on() -> None:
    whitened = Whitened([1.0, 2.0], [1.0, 1.0], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(InputError, match="normalisation whitened; expected image or fixed"):
        normalisation_for_bands(whitened, [0.5, 0.6], [0.55, 0.65])
