"""Samples in their stored type until the device, and the caches of what was read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spectralx.data import (
    DataError,
    FixedStatistics,
    ImageMinMax,
    Pair,
    TileDataset,
    Whitened,
    collate,
    finish,
    write_raster,
)
from spectralx.data.augment import (
    Compose,
    RandomCrop,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCrop,
    Resize,
)
from spectralx.data.cache import DiskCache, MemoryCache
from spectralx.data.samples import RawSample

SIZE = 12
TRANSFORMS = {
    "none": None,
    "resize": Compose([RandomFlip(), RandomQuarterTurn(), Resize(8)]),
    "crop": Compose([RandomFlip(), RandomCrop(8)]),
    "resized-crop": RandomResizedCrop(8),
}


def dataset(folder: Path, dtype: str, nodata: float | None = None, **options: Any) -> TileDataset:
    draw = np.random.default_rng(0)
    pairs = []
    for index in range(3):
        low = -500 if dtype in ("int16", "int32", "float32") else 0
        values = draw.integers(low, 200 if dtype == "uint8" else 9000, (2, SIZE, SIZE))
        pixels = values.astype(dtype)
        if dtype == "uint16":
            pixels[0, 0, 0] = 65535
        if nodata is not None:
            pixels[:, 3:5, 2:6] = nodata
            pixels[1, 7, 7] = nodata
        if dtype == "float32":
            pixels[0, 9, 9] = np.nan
        pair = Pair(folder / f"{index}.tif", folder / f"{index}_label.tif")
        write_raster(pair.image, pixels, nodata=nodata)
        write_raster(pair.label, draw.integers(0, 3, (SIZE, SIZE)).astype(np.uint8))
        pairs.append(pair)
    names = ["unlabelled", "a", "b"]
    return TileDataset(pairs, name="own", wavelengths=[0.5, 0.6], class_names=names, **options)


def batch_of(data: TileDataset) -> Any:
    torch.manual_seed(0)
    return collate([data[index] for index in range(len(data))])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("fixed", [False, True])
def test_raw_samples_are_the_same_once_finished(
    tmp_path: Path, dtype: str, transform: str, fixed: bool
) -> None:
    scaling = FixedStatistics([1000.0, 2000.0], [500.0, 0.0]) if fixed else ImageMinMax()
    plain = dataset(tmp_path, dtype, 7, normalisation=scaling, transform=TRANSFORMS[transform])
    raw = plain.with_raw_samples()
    assert not plain.raw_samples
    expected, found = batch_of(plain), batch_of(raw)
    kept = {"int32": torch.float32}.get(dtype, getattr(torch, dtype))
    images = found["image"] if isinstance(found["image"], list) else [found["image"]]
    assert all(image.dtype == kept for image in images)
    size = None if transform == "none" else (8, 8)
    finished: Any = finish(found, size=size, clipped=fixed)
    assert finished["image"].dtype == torch.float32
    # To the bit: the same operations on the same numbers.
    assert torch.equal(finished["image"], expected["image"])
    assert torch.equal(finished["mask"], expected["mask"])
    assert finished["path"] == expected["path"]
    assert finish(expected, size=size, clipped=fixed) is expected


@pytest.mark.parametrize("transform", ["none", "resize"])
def test_raw_samples_are_whitened_once_finished(tmp_path: Path, transform: str) -> None:
    scaling = Whitened([1000.0, 2000.0], [500.0, 700.0], [[2.0, -1.5], [-1.5, 2.0]])
    plain = dataset(
        tmp_path, "uint16", 7, normalisation=scaling, transform=TRANSFORMS.get(transform)
    )
    expected, found = batch_of(plain), batch_of(plain.with_raw_samples())
    size = None if transform == "none" else (8, 8)
    mixing = torch.from_numpy(scaling.mixing)
    finished: Any = finish(found, size=size, clipped=False, mixing=mixing)
    # Sums over bands in another order.
    torch.testing.assert_close(finished["image"], expected["image"], rtol=1e-5, atol=1e-5)
    assert torch.equal(finished["mask"], expected["mask"])


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_jitter_moves_the_valid_values_of_each_band(tmp_path: Path, dtype: str) -> None:
    scaling = FixedStatistics([1000.0, 2000.0], [500.0, 700.0])
    plain = dataset(tmp_path, dtype, 7, normalisation=scaling)
    moved = plain.with_jitter(0.5)
    torch.manual_seed(3)
    before, after = plain[0]["image"], moved[0]["image"]
    valid = before != 0
    difference = after - before
    assert (after[:, 3:5, 2:6] == 0).all()
    for band in range(2):
        offsets = difference[band][valid[band]]
        assert offsets.std() < 1e-6
        assert offsets.mean().abs() > 1e-3
    assert not torch.equal(moved[0]["image"], after)
    torch.manual_seed(3)
    assert torch.equal(moved[0]["image"], after)
    expected, found = batch_of(moved), batch_of(moved.with_raw_samples())
    finished: Any = finish(found, size=None, clipped=True)
    torch.testing.assert_close(finished["image"], expected["image"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="spectral_jitter: found -1; expected at least 0"):
        plain.with_jitter(-1)


def test_crops_travel_in_the_stored_type(tmp_path: Path) -> None:
    data = dataset(tmp_path, "uint16", transform=RandomCrop(8)).with_raw_samples()
    sample: RawSample = data[0]  # type: ignore[assignment]
    assert sample["image"].nbytes == 2 * 8 * 8 * 2
    assert sample["image"].is_contiguous()
    assert sample["nodata"].isnan()


def test_other_normalisations_cannot_wait(tmp_path: Path) -> None:
    data = dataset(tmp_path, "uint8", normalisation=lambda values, valid: values)
    with pytest.raises(TypeError, match="expected ImageMinMax, FixedStatistics or Whitened"):
        data.with_raw_samples()[0]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_caches_give_what_was_read(tmp_path: Path, dtype: str) -> None:
    plain = dataset(tmp_path, dtype, 7)
    expected = [plain[index] for index in range(3)]
    for cache in (MemoryCache(), DiskCache(tmp_path / "cache", plain)):
        data = plain.with_cache(cache)
        for _ in range(2):
            for index, sample in enumerate(expected):
                found = data[index]
                assert torch.equal(found["image"], sample["image"])
                assert torch.equal(found["mask"], sample["mask"])
    files = list((tmp_path / "cache").rglob("*"))
    assert len([path for path in files if path.suffix == ".safetensors"]) == 3
    assert not [path for path in files if "writing" in path.name]


def test_the_disk_cache_spares_the_files(tmp_path: Path) -> None:
    data = dataset(tmp_path, "uint16")
    cached = data.with_cache(DiskCache(tmp_path / "cache", data))
    expected = cached[0]["image"]

    def refuse(index: int) -> Any:
        raise AssertionError(f"read {index} from its file")

    cached.read_pixels = refuse  # type: ignore[method-assign]
    assert torch.equal(cached[0]["image"], expected)


def test_the_disk_cache_follows_files_and_settings(tmp_path: Path) -> None:
    plain = dataset(tmp_path, "uint16")
    cache = DiskCache(tmp_path / "cache", plain)
    data = plain.with_cache(cache)
    before = cache.path_of(0)
    assert data[0]["image"].max() == 1
    pair = plain.pairs[0]
    write_raster(pair.image, np.full((2, SIZE, SIZE), 5, np.uint16))
    assert cache.path_of(0) != before
    assert not data[0]["image"].any()
    others = [
        plain._replaced(nodata=3.0),
        plain.subset([Pair(*pair[:2], (0, 0, 4, 4))], name="window"),
        plain._replaced(keep_bands=(1,)),
        plain._replaced(label_values={0: 0, 1: 2, 2: 1}),
    ]
    names = {DiskCache(tmp_path / "cache", other).path_of(0) for other in [plain, *others]}
    assert len(names) == 5


def test_a_damaged_cache_is_said_and_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = dataset(tmp_path, "uint16")
    cache = DiskCache(tmp_path / "cache", plain)
    data = plain.with_cache(cache)
    expected = data[0]["image"]
    path = cache.path_of(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(data[0]["image"], expected)
    assert f"{path}: damaged" in caplog.text
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    plain = dataset(tmp_path, "uint16")
    (tmp_path / "cache").write_text("a file")
    data = plain.with_cache(DiskCache(tmp_path / "cache", plain))
    with pytest.raises(DataError, match=r"cache: found no way to write .*; expected a folder"):
        data[0]


def test_what_is_too_large_to_read_at_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dataset(tmp_path, "uint16")
    monkeypatch.setattr("spectralx.data.raster.LARGEST_READ", 4 * SIZE * SIZE - 1)
    with pytest.raises(DataError, match=r"0\.tif: found .* of 12x12 pixels, .*; expected at most"):
        plain[0]


def test_a_nodata_value_that_no_pixel_can_have(tmp_path: Path) -> None:
    """-9999 of unsigned pixels is not 55537."""
    plain = dataset(tmp_path, "uint16")
    values = np.full((2, SIZE, SIZE), 55537, np.uint16)
    values[:, 0, 0] = 0
    write_raster(plain.pairs[0].image, values)
    own = plain._replaced(nodata=-9999.0)
    image = own[0]["image"]
    assert image.sum() == 2 * (SIZE**2 - 1)
    raw = collate([own.with_raw_samples()[0]])
    assert torch.equal(finish(raw, size=None, clipped=False)["image"][0], image)
