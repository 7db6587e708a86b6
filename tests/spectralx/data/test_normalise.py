from __future__ import annotations

import numpy as np
import pytest

from spectralx.data import DataError, FixedStatistics, ImageMinMax, fit_statistics


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
