"""Labels that stand a part of a pixel beside what they describe."""

from pathlib import Path

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from spectralx.data import Task, build_task, write_raster
from spectralx.data.cache import DiskCache
from spectralx.data.registration import at_offset
from spectralx.data.tiles import TileDataset
from spectralx.datamodule import TaskData
from spectralx.settings import DataSettings, RunSettings

SIZE, NODATA = 16, -1.0


def _scene(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Two smooth bands at these places, float32 [2, rows, columns]."""
    y, x = rows[:, None] / SIZE, columns[None] / SIZE
    return np.stack([2 + np.sin(4 * x) + y**2, 3 + np.cos(3 * y) * x]).astype(np.float32)


def _write(root: Path) -> np.ndarray:
    """One tile of the scene, of which a pixel is missing, for all splits; its pixels."""
    places = np.arange(SIZE)
    pixels = _scene(places, places)
    pixels[:, 2, 12] = NODATA
    write_raster(root / "image.tif", pixels, nodata=NODATA)
    write_raster(root / "label.tif", np.ones((SIZE, SIZE), np.float32))
    for split in ("train", "validation", "test"):
        (root / f"{split}.csv").write_text("image,mask\nimage.tif,label.tif\n")
    return pixels


def _task(root: Path, offset: tuple[float, float]) -> Task:
    return build_task(
        "folder",
        root,
        image_size=None,
        flips=False,
        turns=False,
        wavelengths=[0.5, 0.6],
        label_offset=offset,
    )


def test_the_image_is_read_at_the_offset() -> None:
    places = np.arange(SIZE)
    found, nodata = at_offset(_scene(places, places), None, (0.25, -0.5))
    assert nodata is None
    assert found.dtype == np.float32
    inside = (slice(None), slice(3, -3), slice(3, -3))
    assert_allclose(found[inside], _scene(places + 0.25, places - 0.5)[inside], atol=2e-3)
    whole = _scene(places, places).astype(np.uint16)
    moved, _ = at_offset(whole, None, (1.0, 0.0))
    assert_allclose(moved[:, :-1], whole[:, 1:], atol=1e-5)
    assert_allclose(moved[:, -1], whole[:, -1], atol=1e-5)
    same = at_offset(whole, 7.0, (0.0, 0.0))
    assert same[0] is whole
    assert same[1] == 7.0


def test_places_beside_missing_pixels_are_missing() -> None:
    pixels = _scene(np.arange(SIZE), np.arange(SIZE))
    pixels[0, 5, 5] = NODATA
    pixels[1] = NODATA
    found, _ = at_offset(pixels, NODATA, (0.25, -0.25))
    missing = np.zeros((SIZE, SIZE), bool)
    missing[4:6, 5:7] = True  # their places lie between the missing pixel and another
    assert_array_equal(np.isnan(found[0]), missing)
    assert np.isnan(found[1]).all()


def test_a_task_resamples_training_and_tests_alike(tmp_path: Path) -> None:
    pixels = _write(tmp_path)
    plain, moved = _task(tmp_path, (0.0, 0.0)), _task(tmp_path, (0.25, -0.25))
    expected, _ = at_offset(pixels, NODATA, (0.25, -0.25))
    for part in (moved.train, moved.validation, moved.source_test):
        values, valid = part.raw[0]
        assert_array_equal(np.where(valid, values, np.nan), expected)
        mask = part[0]["mask"].numpy()
        assert_array_equal(mask == 0, np.isnan(expected).all(axis=0))
        assert (mask == 0).sum() == 4
    assert_array_equal(plain.train.raw[0][0][:, 0], pixels[:, 0])
    settings = DataSettings(
        str(tmp_path), "folder", SIZE, wavelengths=[0.5, 0.6], label_offset=(0.25, -0.25)
    )
    read = TaskData(settings, RunSettings()).task.train.raw[0][0]
    assert_array_equal(read, moved.train.raw[0][0])


def test_a_disk_cache_tells_offsets_apart(tmp_path: Path) -> None:
    _write(tmp_path)
    found = []
    for offset in ((0.0, 0.0), (0.25, -0.25)):
        train = _task(tmp_path, offset).train
        assert isinstance(train, TileDataset)
        cached = train.with_cache(DiskCache(tmp_path / "cache", train))
        cached.read(0)
        again = cached.read(0).pixels
        assert_array_equal(again, train.read(0).pixels)
        found.append(again)
    assert not np.array_equal(found[0], found[1])
