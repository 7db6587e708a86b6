from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from spectralx.data import (
    FixedStatistics,
    ImageMinMax,
    Normalisation,
    Whitened,
    raster_info,
    read_image,
)
from spectralx.prediction.ahead import ahead
from spectralx.prediction.scaling import Scaler
from spectralx.prediction.scene import SceneReading, read_tiles, scene_scaling
from spectralx.prediction.tiles import plan_axis
from tests.spectralx.prediction.scenes import pixels, write_scene

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("kind", ["image", "fixed", "whitened"])
def test_scaling_on_the_device_is_that_of_training(tmp_path: Path, dtype: str, kind: str) -> None:
    values = RNG.uniform(1, 250, (3, 40, 33)).astype(dtype)
    values[0, 5:9, 3:8] = 7
    if values.dtype.kind == "f":
        values[1, 0, 0], values[2, 3, 3] = np.nan, np.inf
    path = tmp_path / "scene.tif"
    write_scene(path, values, nodata=7)
    mean, std = [90.0, 120.0, 0.0], [40.0, 0.0, 9.0]
    mixing = [[2.0, -1.0, 0.5], [-1.0, 3.0, 0.25], [0.5, 0.25, 1.0]]
    choices: dict[str, Normalisation] = {
        "image": ImageMinMax(),
        "fixed": FixedStatistics(mean, std),
        "whitened": Whitened(mean, std, mixing),
    }
    normalisation = choices[kind]
    expected = normalisation(*read_image(path)[:2])
    reading = SceneReading(raster_info(path), (0, 1, 2), 7.0)
    axes = [plan_axis(side, tile=40, cell=1, overlap=4) for side in (40, 33)]
    (batch,) = read_tiles(reading, axes[0], axes[1], first_row=0, batch_size=2)
    scaling = (
        normalisation.scaling()
        if isinstance(normalisation, (FixedStatistics, Whitened))
        else scene_scaling(reading, name="", progress=False)
    )
    assert batch.pixels is not None
    found = Scaler(scaling, reading, (40, 40), torch.device("cpu"))(batch.pixels)
    assert found.dtype == torch.float32
    # To the bit, but for sums over bands in another order.
    rounding = 1e-6 if kind == "whitened" else 0.0
    assert np.allclose(found[0, :, :, :33].numpy(), expected, rtol=rounding, atol=100 * rounding)
    mirrored = found[0, :, :, 33:].numpy()
    assert np.allclose(mirrored, expected[:, :, :25:-1], rtol=rounding, atol=100 * rounding)


def test_tiles_hold_the_scene_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    values = pixels(2, 70, 95)
    values[:, :40, 50:] = 0
    path = write_scene(tmp_path / "scene.tif", values, nodata=0)
    reading = SceneReading(raster_info(path), (1, 0), 0.0)
    rows, columns = (
        plan_axis(side, tile=8, cell=4, overlap=2, offset=off) for side, off in ((70, 5), (95, 3))
    )
    seen = np.zeros((70, 95), dtype=bool)
    passed = 0
    for batch in read_tiles(reading, rows, columns, first_row=0, batch_size=2):
        passed += batch.passed
        assert batch.valid is not None
        top = max(rows.span(batch.row, batch.row)[0], 0)
        height, width = batch.valid.shape
        left = batch.first_column
        area = (slice(top, top + height), slice(left, left + width))
        assert np.array_equal(batch.valid, (values[(slice(None), *area)] != 0).any(0))
        for place, tile in enumerate(batch.columns):
            left = columns.span(tile, tile)[0]
            begin, end = max(left, 0), min(left + 32, 95)
            top = rows.span(batch.row, batch.row)[0]
            first, last = max(top, 0), min(top + 32, 70)
            assert batch.pixels is not None
            inner = batch.pixels[place, :, first - top : last - top, begin - left : end - left]
            assert np.array_equal(inner.numpy(), values[::-1, first:last, begin:end])
            seen[first:last, begin:end] = True
    assert passed == len(rows.starts) * len(columns.starts)
    assert seen[(values != 0).any(0)].all()
    assert not seen.all()


def test_what_is_read_ahead_arrives_in_order_and_errors_too() -> None:
    def broken() -> Iterator[int]:
        yield from range(5)
        raise ValueError("damaged")

    reader = ahead(broken())
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="damaged"):
        next(reader)
    assert list(ahead(range(100), depth=3)) == list(range(100))


def test_reading_ahead_ends_with_its_reader() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    reader = ahead(endless())
    assert next(reader) == 1
    reader.close()
    gc.collect()
    assert closed.wait(5)
    assert threading.active_count() == before
