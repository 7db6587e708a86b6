from __future__ import annotations

import json

import numpy as np
import pytest

from spectralx.data import (
    DataError,
    FixedStatistics,
    ImageMinMax,
    Whitened,
    fit_statistics,
    fit_whitening,
)
from spectralx.data.normalise import describe, restore_normalisation


def _image(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.normal(1000, 300, (4, 8, 9)).astype(np.float32)
    valid = rng.random((4, 8, 9)) > 0.2
    values[~valid] = 0
    return values, valid


def test_each_band_spans_zero_to_one_over_its_valid_values() -> None:
    values, valid = _image()
    scaled = ImageMinMax()(values, valid)
    assert scaled.dtype == np.float32
    assert (scaled[~valid] == 0).all()
    for band in range(4):
        own = values[band][valid[band]].astype(np.float64)
        expected = (own - own.min()) / (own.max() - own.min())
        assert np.allclose(scaled[band][valid[band]], expected, atol=1e-6)


def test_missing_values_do_not_stretch_an_image() -> None:
    values, valid = _image()
    wild = values.copy()
    wild[~valid] = 1e9
    assert np.array_equal(ImageMinMax()(wild, valid), ImageMinMax()(values, valid))


@pytest.mark.parametrize("missing", [False, True])
def test_flat_and_empty_bands_are_zero(missing: bool) -> None:
    values = np.full((1, 3, 3), 5.0, np.float32)
    valid = np.full((1, 3, 3), not missing)
    assert (ImageMinMax()(values, valid) == 0).all()


def test_fixed_statistics_are_those_of_all_valid_values() -> None:
    images = [_image(seed) for seed in range(5)]
    fitted = fit_statistics(images)
    for band in range(4):
        every = np.concatenate([values[band][valid[band]] for values, valid in images])
        assert fitted.mean[band] == pytest.approx(every.mean(dtype=np.float64))
        assert fitted.std[band] == pytest.approx(every.std(dtype=np.float64))


def test_fixed_statistics_keep_brightness() -> None:
    values, valid = _image()
    everywhere = np.ones_like(valid)
    scaling = FixedStatistics([1000.0] * 4, [300.0] * 4)
    dark, bright = scaling(values, everywhere), scaling(values + 100, everywhere)
    inside = (dark > 0) & (bright < 1)
    assert np.allclose((bright - dark)[inside], 100 / 1200, atol=1e-5)
    assert 0 <= dark.min() <= dark.max() <= 1
    assert (scaling(values, valid)[~valid] == 0).all()


def test_fixed_statistics_of_other_bands_are_refused() -> None:
    values, valid = _image()
    with pytest.raises(DataError, match="found 3 bands; expected 4"):
        FixedStatistics([0.0] * 3, [1.0] * 3)(values, valid)
    with pytest.raises(ValueError, match="std: found 1 values; expected 2"):
        FixedStatistics([0.0, 1.0], [1.0])
    with pytest.raises(DataError, match="found no image"):
        fit_statistics([])


def _alike(seed: int, bands: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Bands [5, 12, 15] that differ by a few parts in a hundred; one lacks pixels."""
    rng = np.random.default_rng(seed)
    common = rng.normal(2000, 500, (1, 12, 15))
    values = (common + rng.normal(0, 20, (bands, 12, 15))).astype(np.float32)
    valid = np.ones_like(values, dtype=bool)
    valid[1, 0, :4] = False
    values[~valid] = 0
    return values, valid


def test_whitened_bands_are_uncorrelated() -> None:
    images = [_alike(seed) for seed in range(4)]
    whitened = fit_whitening(images, shrinkage=1e-6)
    scaled = [whitened(values, valid)[:, valid.all(0)] for values, valid in images]
    pixels = np.concatenate(scaled, axis=1).astype(np.float64)
    assert np.allclose(pixels.mean(axis=1), 0, atol=1e-3)
    assert np.allclose(np.cov(pixels, bias=True), np.eye(5), atol=5e-3)


def test_whitening_is_the_inverse_root_of_the_shrunk_correlation() -> None:
    images = [_alike(seed) for seed in range(3)]
    every = np.concatenate([values[:, valid.all(0)] for values, valid in images], axis=1)
    every = every.astype(np.float64)
    correlation = 0.9 * np.corrcoef(every) + 0.1 * np.eye(5)
    whitened = fit_whitening(images, shrinkage=0.1)
    mixing = whitened.mixing.astype(np.float64)
    assert np.allclose(mixing, mixing.T)
    product = mixing @ correlation @ mixing
    assert np.allclose(product / product[0, 0], np.eye(5), atol=1e-4)
    scaled = [whitened(values, valid)[:, valid.all(0)] for values, valid in images]
    assert np.concatenate(scaled, axis=1).var(axis=1).mean() == pytest.approx(1, abs=1e-3)
    assert whitened.statistics.mean == pytest.approx(every.mean(axis=1))
    assert whitened.statistics.std == pytest.approx(every.std(axis=1))


def test_missing_values_add_nothing_to_other_bands() -> None:
    whitened = fit_whitening([_alike(0)])
    values, valid = _alike(0)
    wild = values.copy()
    wild[~valid] = 1e9
    scaled = whitened(wild, valid)
    assert np.array_equal(scaled, whitened(values, valid))
    assert (scaled[~valid] == 0).all()
    middle = values.copy()
    middle[~valid] = whitened.statistics.mean[1]
    elsewhere = [0, 2, 3, 4]
    assert np.allclose(
        whitened(middle, np.ones_like(valid))[elsewhere], scaled[elsewhere], atol=1e-4
    )


def test_a_band_that_never_changes_stays_apart_from_the_others() -> None:
    values, valid = _alike(1)
    values[3] = 7.0
    whitened = fit_whitening([(values, valid)])
    others = [0, 1, 2, 4]
    alone = fit_whitening([(values[others], valid[others])])
    assert (whitened(values, valid)[3] == 0).all()
    assert np.allclose(whitened(values, valid)[others], alone(values[others], valid[others]))


def test_what_cannot_be_whitened_is_refused() -> None:
    values, valid = _alike(0)
    with pytest.raises(ValueError, match="shrinkage: found 0; expected more than 0"):
        fit_whitening([(values, valid)], shrinkage=0)
    with pytest.raises(DataError, match="found 0 pixels valid in all bands; expected two or more"):
        fit_whitening([(values, np.zeros_like(valid))])
    with pytest.raises(ValueError, match=r"mixing: found shape \[1, 2\]; expected 2 rows of 2"):
        Whitened([0.0, 1.0], [1.0, 1.0], [[1.0, 0.0]])
    with pytest.raises(DataError, match="found 5 bands; expected 4"):
        fit_whitening([(values, valid)])(values[:4], valid[:4])


def test_a_checkpoint_keeps_every_normalisation() -> None:
    values, valid = _alike(2)
    images = [(values, valid)]
    for each in (ImageMinMax(), fit_statistics(images), fit_whitening(images)):
        restored = restore_normalisation(json.loads(json.dumps(describe(each))))
        assert type(restored) is type(each)
        assert np.array_equal(restored(values, valid), each(values, valid))
