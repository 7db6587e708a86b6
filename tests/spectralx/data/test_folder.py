from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from spectralx.data import DataError, FolderDataset, build_task, write_raster

NAMES = ("train", "validation", "test")
NODATA = -32768.0
BANDS = 5
DEAD = (1, 3)


def _folder(root: Path, tiles: int = 6, *, wavelengths: bool = True, csv: bool = True) -> Path:
    """Tiles of 5 bands of which bands 1 and 3 are nodata everywhere, and one corner of tile 0."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for tile in range(tiles):
        image = rng.uniform(1, 5000, (BANDS, 8, 8)).astype(np.float32)
        image[list(DEAD)] = NODATA
        label = rng.integers(0, 4, (8, 8)).astype(np.float32)
        label[0, 0] = 3
        if tile == 0:
            image[:, :2, :2] = NODATA
        image[2, 7, 7] = NODATA
        texts = [f"band {i} ({500.5 + 100 * i} Nanometers)" for i in range(BANDS)]
        write_raster(
            root / f"images/t{tile}.tif",
            image,
            nodata=NODATA,
            descriptions=texts if wavelengths else None,
        )
        write_raster(root / f"labels/t{tile}.tif", label)
    if csv:
        for name, numbers in zip(NAMES, ((0, 1, 2, 3), (4,), (5,)), strict=True):
            rows = [f"images/t{number}.tif,labels/t{number}.tif" for number in numbers]
            (root / f"{name}.csv").write_text("\n".join(["image,mask", *rows]) + "\n")
    return root


def test_csv_files_tell_the_splits(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    sizes = [len(FolderDataset(root, name)) for name in NAMES]
    assert sizes == [4, 1, 1]
    assert FolderDataset(root, "test")[0]["path"] == str(root / "images/t5.tif")


def test_without_csv_files_tiles_are_divided(tmp_path: Path) -> None:
    root = _folder(tmp_path, csv=False)
    parts = [{pair.image.name for pair in FolderDataset(root, name).pairs} for name in NAMES]
    assert [len(part) for part in parts] == [4, 1, 1]
    assert len(set().union(*parts)) == 6


def test_columns_may_be_in_any_order_and_more(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "train.csv").write_text(
        "\ufeffmask, id ,image\nlabels/t1.tif,7,images/t1.tif\n", encoding="utf-8"
    )
    dataset = FolderDataset(root)
    assert [pair.image.name for pair in dataset.pairs] == ["t1.tif"]
    assert dataset.pairs[0].label.name == "t1.tif"


def test_bands_without_data_are_dropped_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = FolderDataset(_folder(tmp_path))
    assert dataset.dropped_bands == DEAD
    assert dataset.bands == 3
    assert dataset.wavelengths == pytest.approx((0.5005, 0.7005, 0.9005))
    assert dataset[0]["image"].shape == (3, 8, 8)
    assert "bands 2, 4 of 5 hold nodata in all training images and are dropped" in caplog.text


def test_the_training_images_decide_which_bands_are_dropped(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    write_raster(root / "images/t5.tif", np.full((BANDS, 8, 8), 9, np.float32), nodata=NODATA)
    assert FolderDataset(root, "test").dropped_bands == DEAD
    assert FolderDataset(root, "test")[0]["image"].shape == (3, 8, 8)


def test_missing_pixels_are_zero_and_unlabelled(tmp_path: Path) -> None:
    dataset = FolderDataset(_folder(tmp_path))
    sample = dataset[0]
    assert (sample["image"][:, :2, :2] == 0).all()
    assert (sample["mask"][:2, :2] == 0).all()
    # A pixel with some of its bands keeps its label.
    assert sample["image"][1, 7, 7] == 0
    assert sample["mask"][7, 7] == dataset.read_classes(0)[7, 7]
    values, valid = dataset.read_values(0)
    for band in range(3):
        own = sample["image"][band].numpy()[valid[band]]
        assert own.min() == 0
        assert own.max() == pytest.approx(1)
    assert not valid[:, :2, :2].any()
    assert values[:, :2, :2].max() == 0


def test_classes_are_counted_or_named(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    assert FolderDataset(root).class_names == ("unlabelled", "class 1", "class 2", "class 3")
    named = FolderDataset(root, class_names=["roof", "tree", "soil", "water"])
    assert named.class_names == ("unlabelled", "roof", "tree", "soil", "water")
    with pytest.raises(DataError, match=r"labels/t0\.tif: found label 3; expected classes 0 to 2"):
        FolderDataset(root, class_names=["roof", "tree"])[0]


def test_wavelengths_come_from_the_configuration_too(tmp_path: Path) -> None:
    root = _folder(tmp_path, wavelengths=False)
    with pytest.raises(DataError, match=r"t0\.tif: found no wavelengths .* of its 5 bands"):
        FolderDataset(root)
    dataset = FolderDataset(root, wavelengths=[0.4, 0.5, 0.6, 0.7, 0.8])
    assert dataset.wavelengths == (0.4, 0.6, 0.8)
    with pytest.raises(DataError, match=r"t0\.tif: found 5 bands; expected 4"):
        FolderDataset(root, wavelengths=[0.4, 0.5, 0.6, 0.7])


def test_tiles_of_any_size_become_the_models(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    image = np.ones((BANDS, 5, 11), np.float32)
    image[list(DEAD)] = NODATA
    write_raster(root / "images/t1.tif", image, nodata=NODATA)
    write_raster(root / "labels/t1.tif", np.ones((5, 11), np.uint8))
    task = build_task("folder", root, image_size=16)
    for index in range(len(task.train)):
        assert task.train[index]["image"].shape == (3, 16, 16)
        assert task.train[index]["mask"].shape == (16, 16)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: found no such folder; expected images/"):
        FolderDataset(tmp_path / "gone")
    root = _folder(tmp_path / "a")
    (root / "test.csv").write_text("image,label\n")
    with pytest.raises(DataError, match=r"test\.csv: found columns image, label; expected columns"):
        FolderDataset(root)
    (root / "test.csv").write_text("image,mask\n")
    with pytest.raises(DataError, match=r"test\.csv: found no rows; expected at least one image"):
        FolderDataset(root)
    (root / "test.csv").write_text("image,mask\nimages/t0.tif,\n")
    with pytest.raises(DataError, match=r"test\.csv line 2: found an empty entry"):
        FolderDataset(root)
    (root / "test.csv").write_text("image,mask\nimages/t0.tif,labels/t0.tif\nimages/no.tif,x\n")
    with pytest.raises(DataError, match=r"test\.csv line 3: found no file .*no\.tif; expected"):
        FolderDataset(root)
    (root / "test.csv").unlink()
    assert len(FolderDataset(root)) == 4
    with pytest.raises(DataError, match=r"test\.csv: found no such file; expected a CSV"):
        FolderDataset(root, "test")
    with pytest.raises(DataError, match=r"test\.csv: found no such file; expected a CSV"):
        build_task("folder", root)
    with pytest.raises(ValueError, match="split: found 'val'; expected one of train"):
        FolderDataset(root, "val")


def test_a_folder_of_nothing_but_nodata_is_refused(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    for tile in range(6):
        write_raster(root / f"images/t{tile}.tif", np.full((5, 8, 8), NODATA), nodata=NODATA)
    with pytest.raises(DataError, match="found nodata in all bands of all training images"):
        FolderDataset(root, wavelengths=[0.4, 0.5, 0.6, 0.7, 0.8])


@pytest.fixture
def real() -> Path:
    folder = os.environ.get("SPECTRALX_REAL_DATA")
    if not folder:
        pytest.skip("SPECTRALX_REAL_DATA is not set: no test on real EnMAP tiles")
    root = Path(folder)
    return root / "enmap_potsdam" if (root / "enmap_potsdam").is_dir() else root


def test_real_tiles_are_read(real: Path) -> None:
    task = build_task("folder", real, image_size=64)
    assert [len(part) for part in (task.train, task.validation, task.source_test)] == [14, 2, 2]
    assert task.bands == 218
    assert task.num_classes == 7
    assert isinstance(task.train, FolderDataset)
    assert task.train.file_bands == 224
    assert task.wavelengths[0] == pytest.approx(0.41824)
    assert task.wavelengths[-1] == pytest.approx(2.446, abs=2e-3)
    counts = np.zeros(7, dtype=np.int64)
    for index in range(14):
        sample = task.train[index]
        assert sample["image"].shape == (218, 64, 64)
        assert 0 <= sample["image"].min() < sample["image"].max() <= 1
        counts += np.bincount(sample["mask"].flatten().numpy(), minlength=7)
    assert (counts > 0).all()
    assert task.source_test[0]["mask"].shape == (32, 32)


def test_real_tiles_are_whitened(real: Path) -> None:
    def directions(normalisation: str) -> float:
        """How many directions of the bands' space share the variance (participation ratio)."""
        task = build_task("folder", real, image_size=32, normalisation=normalisation)
        pixels = torch.cat([task.train[index]["image"].flatten(1) for index in range(14)], dim=1)
        spread = torch.linalg.eigvalsh(pixels.double().cov())
        return float(spread.sum() ** 2 / spread.square().sum())

    assert directions("fixed") < 3
    assert directions("whitened") > 10


@pytest.mark.parametrize("name", ["../out.tif", "images/linked.tif", "{root}/../out.tif", "a\x00b"])
def test_lists_stay_within_the_data_set(tmp_path: Path, name: str) -> None:
    root = _folder(tmp_path / "set")
    (tmp_path / "out.tif").write_bytes((root / "images/t0.tif").read_bytes())
    (root / "images/linked.tif").symlink_to(tmp_path / "out.tif")
    row = f"{name.format(root=root)},labels/t0.tif"
    (root / "train.csv").write_text(f"image,mask\n{row}\n")
    with pytest.raises(DataError, match=r"train\.csv line 2: found .*; expected") as caught:
        FolderDataset(root)
    assert "\n" not in str(caught.value)
