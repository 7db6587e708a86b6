"""The layouts on disk, by files made by hand and by the synthetic scenes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from spectralx.data import (
    DataError,
    Dfc2020,
    Mts12,
    TileDataset,
    WhuOhs,
    WhuOhsTransfer,
    read_raster,
)
from spectralx.data import dfc2020 as dfc
from spectralx.data import mts12 as mts
from spectralx.data import whu_ohs as whu

from .conftest import COUNT, SIZE, Maker

Scenes = Callable[[str], Path]


def _square(values: list[int]) -> np.ndarray:
    """A 6x6 label map that starts with `values` and repeats the last."""
    return np.array(values + values[-1:] * (36 - len(values)), dtype=np.uint8).reshape(6, 6)


def _classes(dataset: TileDataset, count: int, index: int = 0) -> list[int]:
    return dataset[index]["mask"].flatten()[:count].tolist()


# --- WHU-OHS


def _whu_side(make: Maker, folder: Path, name: str, label: np.ndarray) -> None:
    make.image(folder / "image" / name, bands=32)
    make.label(folder / "label" / name, label)


def test_whu_labels_are_taken_as_they_are(tmp_path: Path, make: Maker) -> None:
    _whu_side(make, tmp_path / "val", "O3_0008.tif", _square(list(range(25))))
    dataset = WhuOhs(tmp_path, "validation")
    assert _classes(dataset, 25) == list(range(25))
    assert (dataset.num_classes, dataset.bands) == (25, 32)
    assert dataset.class_names[0] == "unlabelled"
    assert dataset.class_names[24] == "ocean"
    assert dataset[0]["path"].endswith("val/image/O3_0008.tif")


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("layout", ["flat", "above", "below"])
def test_whu_transfer_drops_18_and_20_and_renumbers(
    tmp_path: Path, make: Maker, side: str, layout: str
) -> None:
    folder, name = tmp_path / "transfer-STall" / side, "T1_0002.tif"
    _whu_side(make, folder, name, _square(list(range(25))))
    if layout != "flat":
        for kind in ("image", "label"):
            before = folder / kind / name
            after = folder / ("ts/" + kind if layout == "above" else kind + "/ts") / name
            after.parent.mkdir(parents=True, exist_ok=True)
            before.rename(after)
        if layout == "above":
            (folder / "image").rmdir()
            (folder / "label").rmdir()
    assert whu.is_divided(tmp_path, side) == (layout != "flat")
    dataset = WhuOhsTransfer(tmp_path, side, None if layout == "flat" else "test")
    expected = [*range(18), 0, 18, 0, 19, 20, 21, 22]
    assert _classes(dataset, 25) == expected
    assert dataset.num_classes == 23
    assert dataset.class_names[18:] == ("gobi", "marshland", "bare land", "bare rock", "ocean")


def test_a_divided_side_read_whole_is_all_of_its_splits(tmp_path: Path, make: Maker) -> None:
    for split in ("tr", "val", "ts"):
        _whu_side(make, tmp_path / "transfer-STall/source" / split, f"{split}.tif", _square([1]))
    dataset = WhuOhsTransfer(tmp_path, "source")
    names = [Path(dataset[index]["path"]).name for index in range(len(dataset))]
    assert names == ["tr.tif", "val.tif", "ts.tif"]


def test_whu_wavelengths_rise_evenly() -> None:
    steps = np.diff(whu.WAVELENGTHS)
    assert len(whu.WAVELENGTHS) == 32
    assert (steps > 0.01).all()
    assert (steps < 0.025).all()


# --- DFC2020


def _dfc_tile(make: Maker, root: Path, season: str, city: str, label: np.ndarray) -> None:
    name = f"ROIs0000_{season}_{{}}_{city}_p7.tif"
    make.image(root / season / "image" / f"s2_{city}" / name.format("s2"), bands=13)
    make.label(root / season / "label" / f"dfc_{city}" / name.format("dfc"), label)


def test_dfc_raw_labels(tmp_path: Path, make: Maker) -> None:
    # Both the folder above and the city hold "s2", which names of label files must keep.
    root = tmp_path / "s2_data"
    _dfc_tile(make, root, "spring", "Ces2_s2_x", _square([*range(12), 255]))
    by_default = [0, 1, 2, 0, 3, 4, 5, 6, 0, 7, 8, 0, 0]
    published = [0, 1, 2, 3, 3, 4, 5, 6, 8, 7, 8, 0, 0]
    assert _classes(Dfc2020(root, "spring"), 13) == by_default
    assert _classes(Dfc2020(root, "spring", official_labels=True), 13) == published


def test_dfc_radar_is_skipped(tmp_path: Path, make: Maker) -> None:
    _dfc_tile(make, tmp_path, "winter", "MexicoCity", _square([1]))
    make.image(tmp_path / "winter/image/s1_MexicoCity/ROIs0000_winter_s1_MexicoCity_p7.tif")
    assert len(Dfc2020(tmp_path, "winter")) == 1


def test_dfc_seasons_add_up(tmp_path: Path, make: Maker) -> None:
    for season in dfc.SEASONS:
        _dfc_tile(make, tmp_path, season, "A", _square([1]))
        _dfc_tile(make, tmp_path, season, "B", _square([1]))
    assert len(Dfc2020(tmp_path)) == 8
    assert len(Dfc2020(tmp_path, ("spring", "winter"))) == 4


def test_dfc_without_cities_is_named(tmp_path: Path, make: Maker) -> None:
    make.image(tmp_path / "winter/image/s1_X/a.tif")
    with pytest.raises(DataError, match=r"image: found no s2_\* folder; expected one for each"):
        Dfc2020(tmp_path, "winter")


# --- MTS12


def _mts_tile(make: Maker, root: Path, split: str, stem: str, label: np.ndarray) -> None:
    make.image(root / "image" / split / f"{stem}.tif", bands=24)
    make.label(root / "label" / split / f"{stem}_label.mat", label)


def test_mts_labels_are_read_from_matlab_files(tmp_path: Path, make: Maker) -> None:
    _mts_tile(make, tmp_path, "val", "a", _square(list(range(9))))
    _mts_tile(make, tmp_path, "test", "b", _square([3]).astype(np.float64))
    dataset = Mts12(tmp_path, "validation")
    assert _classes(dataset, 9) == list(range(9))
    assert (dataset.num_classes, dataset.bands) == (9, 24)
    assert dataset.wavelengths[:6] == dataset.wavelengths[18:] == mts.SEASON_WAVELENGTHS
    assert _classes(Mts12(tmp_path, "test"), 2) == [3, 3]
    assert len(Mts12(tmp_path, ("validation", "test"))) == 2


def test_damaged_matlab_labels_are_named(tmp_path: Path, make: Maker) -> None:
    path = tmp_path / "label/train/a_label.mat"
    _mts_tile(make, tmp_path, "train", "a", np.arange(36, dtype=np.uint8).reshape(6, 6) % 9)
    dataset, content = Mts12(tmp_path, "train"), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a_label\.mat: found \d+ bytes .*; expected a MATLAB"):
        dataset[0]
    savemat(path, {"lable": np.zeros((6, 6))})
    with pytest.raises(DataError, match="found variables lable; expected a variable 'label'"):
        dataset[0]
    savemat(path, {"label": np.zeros((6, 6, 2))})
    with pytest.raises(DataError, match=r"found a label of shape \(6, 6, 2\); expected rows"):
        dataset[0]
    savemat(path, {"label": np.full((6, 6), 0.5)})
    with pytest.raises(DataError, match=r"found label value 0\.5; expected whole numbers"):
        dataset[0]
    savemat(path, {"label": "text"})
    with pytest.raises(DataError, match=r"found a label of shape|found label values of type"):
        dataset[0]


# --- what all layouts refuse, each error by its file


def test_an_absent_root_is_named(tmp_path: Path) -> None:
    root = tmp_path / "none"
    for build in (
        lambda: WhuOhs(root, "train"),
        lambda: WhuOhsTransfer(root, "source"),
        lambda: Dfc2020(root, "spring"),
        lambda: Mts12(root, "train"),
    ):
        with pytest.raises(DataError, match=r"none/.*: found no such folder; expected the"):
            build()


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "tr/image").mkdir(parents=True)
    with pytest.raises(DataError, match=r"tr/image: found no GeoTIFF; .*WHU-OHS train is empty"):
        WhuOhs(tmp_path, "train")


def test_an_image_without_label_is_named(tmp_path: Path, make: Maker) -> None:
    make.image(tmp_path / "tr/image/S1_0007.tif", bands=32)
    expected = r"tr/image/S1_0007\.tif: found no label .*tr/label/S1_0007\.tif; expected a label"
    with pytest.raises(DataError, match=expected):
        WhuOhs(tmp_path, "train")


def test_other_band_counts_are_named(tmp_path: Path, make: Maker) -> None:
    for name, bands in (("a.tif", 32), ("b.tif", 31)):
        make.image(tmp_path / "tr/image" / name, bands=bands)
        make.label(tmp_path / "tr/label" / name, _square([1]))
    with pytest.raises(DataError, match=r"b\.tif: found 31 bands; expected 32"):
        WhuOhs(tmp_path, "train")[1]
    (tmp_path / "tr/image/a.tif").unlink()
    with pytest.raises(DataError, match=r"b\.tif: found 31 bands; expected 32"):
        WhuOhs(tmp_path, "train")


def test_labels_outside_the_classes_are_named(tmp_path: Path, make: Maker) -> None:
    _whu_side(make, tmp_path / "tr", "a.tif", _square([3, 25]))
    _whu_side(make, tmp_path / "transfer-STall/source", "a.tif", _square([3, 77]))
    with pytest.raises(DataError, match=r"label/a\.tif: found label 25; expected classes 0 to 24"):
        WhuOhs(tmp_path, "train")[0]
    with pytest.raises(DataError, match=r"label/a\.tif: found label 77; expected one of 0-24"):
        WhuOhsTransfer(tmp_path, "source")[0]


def test_sizes_that_differ_are_named(tmp_path: Path, make: Maker) -> None:
    make.image(tmp_path / "tr/image/a.tif", bands=32, size=6)
    make.label(tmp_path / "tr/label/a.tif", np.ones((6, 5), dtype=np.uint8))
    with pytest.raises(DataError, match=r"label/a\.tif: found 6x5 pixels; expected 6x6"):
        WhuOhs(tmp_path, "train")[0]


def test_unknown_splits_are_refused(tmp_path: Path) -> None:
    for build in (
        lambda: WhuOhs(tmp_path, "tr"),
        lambda: WhuOhsTransfer(tmp_path, "left"),
        lambda: Dfc2020(tmp_path, "monsoon"),
        lambda: Mts12(tmp_path, "val"),
    ):
        with pytest.raises(ValueError, match=r"found '.*'; expected one of"):
            build()


def test_errors_cross_data_loading_processes(tmp_path: Path, make: Maker) -> None:
    _whu_side(make, tmp_path / "tr", "a.tif", _square([25]))
    loader = torch.utils.data.DataLoader(WhuOhs(tmp_path, "train"), num_workers=1)
    with pytest.raises(DataError, match="found label 25; expected classes 0 to 24"):
        next(iter(loader))


# --- the synthetic scenes are read back as what they stand for


@pytest.mark.parametrize("layout", ["whu-ohs", "dfc2020", "mts12"])
def test_scenes_are_read(scenes: Scenes, layout: str) -> None:
    root = scenes(layout)
    datasets: list[TileDataset]
    if layout == "whu-ohs":
        sides = [WhuOhsTransfer(root, side) for side in whu.SIDES]
        datasets = [*(WhuOhs(root, split) for split in whu.SPLITS), *sides]
        sizes = [7, 3, 3, COUNT, COUNT]
    elif layout == "dfc2020":
        datasets, sizes = [Dfc2020(root, season) for season in dfc.SEASONS], [COUNT] * 4
    else:
        datasets, sizes = [Mts12(root, split) for split in mts.SPLITS], [8, 2, COUNT]
    assert [len(dataset) for dataset in datasets] == sizes
    seen: set[int] = set()
    for dataset in datasets:
        for index in range(len(dataset)):
            sample = dataset[index]
            assert sample["image"].shape == (len(dataset.wavelengths), SIZE, SIZE)
            assert sample["image"].dtype == torch.float32
            assert sample["mask"].dtype == torch.int64
            assert 0 <= sample["image"].min() <= sample["image"].max() <= 1
            seen |= set(sample["mask"].unique().tolist())
    assert len(seen) >= 9


def test_transfer_of_scenes_never_labels_what_one_side_lacks(scenes: Scenes) -> None:
    root = scenes("whu-ohs")
    raw = [
        {int(value) for path in sorted((root / "transfer-STall" / side / "label").iterdir())
         for value in np.unique(read_raster(path))}
        for side in whu.SIDES
    ]  # fmt: skip
    assert 20 not in raw[0]
    assert 18 not in raw[1]


def test_a_truncated_scene_is_named(scenes: Scenes, tmp_path: Path) -> None:
    root = tmp_path / "cut"
    shutil.copytree(scenes("whu-ohs") / "ts", root / "ts")
    dataset = WhuOhs(root, "test")
    path = dataset.pairs[1].image
    content = path.read_bytes()
    dataset[0]
    # Cut in the pixels, then in the tags behind them.
    for length, found in (
        (len(content) // 2, r"\d+ bytes that do not open as one"),
        (-1, "a file 1 bytes"),
    ):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=rf"{path.name}: found {found}"):
            dataset[1]
