"""Data of one's own: the YAML file, what is read by it, and the commands that check it."""

from __future__ import annotations

import subprocess
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spectralx.data import DataError, TileDataset, build_task, write_raster
from spectralx.data.__main__ import main
from spectralx.data.check import check
from spectralx.data.description import read_description

BANDS = 3
CLASSES = ["water", "forest"]
GEO = {"crs": "EPSG:32633", "transform": (10.0, 0.0, 5e5, 0.0, -10.0, 5e6)}


def geo() -> dict[str, Any]:
    from rasterio import Affine

    return {"crs": GEO["crs"], "transform": Affine(*GEO["transform"])}


def scene(folder: Path, name: str, size: int | tuple[int, int] = 8, **options: Any) -> None:
    """An image and its labels of random values."""
    sides = (size, size) if isinstance(size, int) else size
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    image = draw.integers(100, 9000, (BANDS, *sides)).astype(np.uint16)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    bands = [f"{0.5 + 0.1 * band:.1f} um" for band in range(BANDS)]
    defaults = {**geo(), "descriptions": bands}
    write_raster(folder / "images" / f"{name}.tif", image, **(defaults | options))
    labels = draw.integers(0, 3, sides).astype(np.uint8)
    write_raster(folder / "labels" / f"{name}.tif", labels, **geo())


def described(folder: Path, **changes: Any) -> Path:
    """The YAML file of the data in `folder`; a value of None leaves its key out."""
    values = {"images": "images/*.tif", "labels": "labels/{stem}.tif", "classes": CLASSES}
    values = {key: value for key, value in (values | changes).items() if value is not None}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(10):
        scene(tmp_path, f"t{index}")
    return tmp_path


def test_a_yaml_file_is_a_task(folder: Path) -> None:
    task = build_task(str(described(folder)), "nowhere", image_size=None, flips=False, turns=False)
    parts = (task.train, task.validation, task.source_test)
    assert [len(part) for part in parts] == [8, 1, 1]
    assert task.class_names == ("unlabelled", "water", "forest")
    assert task.wavelengths == pytest.approx((0.5, 0.6, 0.7))
    assert not task.target_tests
    sample = task.train[0]
    assert sample["image"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="wavelengths: found with task"):
        build_task(str(described(folder)), "nowhere", wavelengths=[1.0])


def test_splits_bands_and_raw_labels(folder: Path) -> None:
    (folder / "train.csv").write_text("image,mask\nimages/t0.tif,labels/t1.tif\n")
    config = described(
        folder,
        images=None,
        splits={"train": "train.csv", "validation": "images/t[23].tif", "test": ["images/t4.tif"]},
        classes={0: None, 1: "forest", 2: "forest"},
        bands=[3, 1],
        wavelengths=[0.5, 0.6, 0.7],
    )
    task = build_task(str(config), "", image_size=None, flips=False, turns=False)
    assert isinstance(task.train, TileDataset)
    assert task.train.pairs[0].label.name == "t1.tif"
    assert [len(task.train), len(task.validation), len(task.source_test)] == [1, 2, 1]
    assert task.wavelengths == (0.7, 0.5)
    assert task.class_names == ("unlabelled", "forest")
    assert set(task.train[0]["mask"].unique().tolist()) == {0, 1}
    whole = build_task(str(described(folder)), "", image_size=None, flips=False, turns=False)
    assert isinstance(whole.train, TileDataset)
    index = [pair.image.name for pair in whole.train.pairs].index("t0.tif")
    assert torch.equal(task.train[0]["image"], whole.train[index]["image"][[2, 0]])


def test_domains_are_tested_apart(tmp_path: Path) -> None:
    for name in ("north", "south", "west"):
        for index in range(3):
            scene(tmp_path / name, f"t{index}")
    domains = {name: {"images": f"{name}/images/*.tif"} for name in ("north", "south")}
    domains["west"] = {"splits": {"test": "west/images/t2.tif"}}  # type: ignore[dict-item]
    config = described(
        tmp_path, images=None, labels="{folder}/../labels/{stem}.tif", domains=domains
    )
    with pytest.raises(DataError, match=r"labels: found '{folder}/../labels.*below the root"):
        read_description(config)
    for name in ("north", "south", "west"):
        for path in (tmp_path / name / "labels").iterdir():
            path.rename(tmp_path / name / "images" / f"{path.stem}.label.tiff")
    config = described(
        tmp_path,
        images=None,
        labels="{folder}/{stem}.label.tiff",
        domains={name: {"images": f"{name}/images/t?.tif"} for name in ("north", "south")}
        | {"west": {"splits": {"test": "west/images/t2.tif"}}},
        source="south",
    )
    task = build_task(str(config), "", image_size=None)
    assert {name: len(part) for name, part in task.target_tests.items()} == {"north": 3, "west": 1}
    assert all("south" in task.train.path_of(index) for index in range(len(task.train)))
    official = build_task(str(config), "", image_size=None, official=True)
    assert len(official.validation) == 4


def test_large_scenes_are_read_by_window(tmp_path: Path) -> None:
    scene(tmp_path, "large", size=(10, 14))
    config = described(tmp_path, tile=4, divide="tiles")
    task = build_task(str(config), "", image_size=None, flips=False, turns=False)
    parts = (task.train, task.validation, task.source_test)
    windows = [pair.window for part in parts for pair in part.pairs]  # type: ignore[attr-defined]
    assert len({*windows}) == len(windows) == 12
    assert all(window[2:] == (4, 4) for window in windows)
    # All windows together hold each labelled pixel once.
    from spectralx.data.raster import read_label

    truth = read_label(tmp_path / "labels" / "large.tif")
    counted: Counter[int] = Counter()
    for part in parts:
        for index in range(len(part)):
            sample = part[index]
            assert sample["image"].shape == (3, 4, 4)
            counted.update(sample["mask"].flatten().tolist())
    for label in (1, 2):
        assert counted[label] == (truth == label).sum()
    # Training windows may overlap, and hold all their labels.
    splits = dict.fromkeys(("train",), "images/large.tif")
    for name in ("validation", "test"):
        scene(tmp_path, name, size=3)
        splits[name] = f"images/{name}.tif"
    config = described(tmp_path, images=None, splits=splits, tile=4, stride=2)
    task = build_task(str(config), "", image_size=None, flips=False, turns=False)
    assert len(task.train) == 4 * 6
    assert task.validation[0]["image"].shape == (3, 3, 3)
    for index in range(len(task.train)):
        row, column, *_ = task.train.pairs[index].window  # type: ignore[attr-defined]
        expected = torch.from_numpy(truth[row : row + 4, column : column + 4])
        assert torch.equal(task.train[index]["mask"], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imgs": "x"}, "unknown key 'imgs'; expected one of root, images"),
        ({"classes": None}, "classes: found None; expected a list of names"),
        ({"classes": {"a": "water"}}, "'a': 'water'; expected whole number: name"),
        ({"labels": "labels/a.tif"}, r"expected one of {stem}, {name}, {folder} in it"),
        ({"labels": None}, "no labels; expected a pattern"),
        ({"images": "../x/*.tif"}, "expected a path below the root"),
        ({"images": "/etc/*.tif"}, "expected a path below the root"),
        ({"images": "none/*.tif"}, r"no GeoTIFF .*none/\*\.tif"),
        ({"splits": {"train": "images/*.tif"}}, "found both images and splits"),
        ({"images": None, "splits": {"training": "x"}}, "unknown key 'training'"),
        ({"images": None, "splits": {"train": "a.csv"}}, r"a\.csv: found no such file"),
        ({"images": None, "splits": {"train": "images/*.tif"}}, "no validation; expected each"),
        (
            {"images": None, "splits": {"train": "images/*.tif", "test": "images/t0.tif"}},
            r"t0\.tif in train and test; expected it in one",
        ),
        ({"domains": {"a": {"images": "images/*.tif"}}}, "found images beside it"),
        ({"images": None, "domains": {"a": {"images": "images/*.tif"}}, "source": "b"},
         "source: found 'b'; expected one of a"),
        ({"bands": [4]}, "bands: found 4; expected 1 to 3"),
        ({"bands": [0]}, "bands: found 0; expected a positive whole number"),
        ({"wavelengths": [0.5]}, "found 3 bands; expected 1, as many as wavelengths"),
        ({"stride": 4}, "stride: found 4; expected no more than tile, None"),
        ({"divide": "tiles"}, "expected tile: the side of a window"),
        ({"unknown_labels": "unlabelled"}, "expected classes given by raw label"),
        ({"verify": "yes please"}, "expected true or false"),
        ({"verify": True}, r"own\.sha256: found no such file"),
        ({"root": "elsewhere"}, "root: found no folder"),
    ],
)  # fmt: skip
def test_errors_are_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build_task(str(described(folder, **changes)), "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a", "images: [", "\x00", "3"])
def test_no_description_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DataError, match=r"a\.yaml"):
        read_description(tmp_path / "a.yaml")


def test_a_yaml_file_builds_no_objects(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("images: !!python/object/apply:os.mkdir [made]\n")
    with pytest.raises(DataError, match=r"a\.yaml: found no YAML"):
        read_description(tmp_path / "a.yaml")


def test_check_of_whole_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(described(folder)), "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "train: 8 images; unlabelled " in printed.out
    assert "mean of each band: 0.5 um " in printed.out
    assert "no problems" in printed.out
    assert printed.err == ""


def test_check_names_each_file_that_is_wrong(folder: Path) -> None:
    from rasterio import Affine

    images, labels = folder / "images", folder / "labels"
    scene(folder, "t0", crs="EPSG:32634")  # the labels stay where they were
    scene(folder, "t1", transform=Affine(10.0, 0.0, 6e5, 0.0, -10.0, 5e6))
    (images / "t2.tif").write_bytes((images / "t2.tif").read_bytes()[:-300])
    (labels / "t3.tif").unlink()
    write_raster(labels / "t4.tif", np.full((8, 8), 7, np.uint8))
    write_raster(labels / "t5.tif", np.ones((8, 7), np.uint8))
    write_raster(images / "t6.tif", np.ones((BANDS, 8, 8), np.float32), **geo())
    write_raster(images / "t7.tif", np.ones((BANDS + 1, 8, 8), np.uint16), **geo())
    write_raster(images / "t8.tif", np.zeros((BANDS, 8, 8), np.uint16), nodata=0, **geo())
    bands = ["0.5 um", "0.9 um", "0.7 um"]
    scene(folder, "t9", descriptions=bands)
    for name in ("a", "b", "c", "d"):
        scene(folder, name)
    config = described(folder, wavelengths=[0.5, 0.6, 0.7])
    report = check(read_description(config))
    expected = [
        "labels/t0.tif: found CRS EPSG:32633; expected EPSG:32634, its image's",
        "images/t0.tif: found CRS EPSG:32634; expected EPSG:32633, as in most images",
        "labels/t1.tif: found upper left (500000, 5e+06), pixel 10 x 10; expected (600000, 5e+06)",
        "images/t2.tif: found",
        "labels/t3.tif; expected a label for each image",
        "labels/t4.tif: found label 7; expected classes 0 to 2",
        "labels/t5.tif: found 8x7 pixels; expected 8x8, the size of",
        "images/t6.tif: found type float32; expected uint16, as in most images",
        "images/t6.tif: found values of 1 on average; expected about",
        "images/t7.tif: found 4 bands; expected 3, as many as wavelengths",
        "images/t8.tif: found no valid value; expected pixels that are not nodata",
        "images/t9.tif: found band 2 at 0.9 um; expected 0.6, as in the description",
    ]
    for text in expected:
        assert [line for line in report.problems if text in line], (text, report.problems)
    assert len(report.problems) == len(expected)
    assert all("\n" not in line for line in report.problems)


def test_check_finds_a_band_that_is_never_there(folder: Path) -> None:
    for path in sorted((folder / "images").iterdir()):
        values = np.ones((BANDS, 8, 8), np.uint16)
        values[1] = 0
        write_raster(path, values, nodata=0)
    report = check(read_description(described(folder, wavelengths=[0.5, 0.6, 0.7])))
    assert len(report.problems) == 1
    assert "no valid value of band 2 in any image; expected some" in report.problems[0]
    report = check(read_description(described(folder, wavelengths=[0.5, 0.6, 0.7], bands=[1, 3])))
    assert report.problems == []


def test_a_manifest_holds_files_to_their_bytes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = described(folder)
    assert main(["manifest", str(config), "--quiet"]) == 0
    assert "own.sha256: 20 files" in capsys.readouterr().out
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", "own.sha256"], cwd=folder, check=False
    )
    assert done.returncode == 0
    assert main(["check", str(config), "--quiet"]) == 0
    task = build_task(str(described(folder, verify=True)), "", image_size=None)
    scene_of = folder / "images" / "t1.tif"
    write_raster(scene_of, np.ones((BANDS, 8, 8), np.uint16))
    named = [
        part.path_of(index)
        for part in (task.train, task.validation, task.source_test)
        for index in range(len(part))
        if not _reads(part, index)
    ]
    assert named == [str(scene_of)]
    (folder / "images" / "t2.tif").unlink()
    (folder / "labels" / "t2.tif").unlink()
    scene(folder, "new")
    report = check(read_description(config))
    assert len(report.problems) == 4
    text = "\n".join(report.problems)
    assert "t1.tif: found sha256" in text
    assert "images/t2.tif: found a checksum but no place in the data" in text
    assert "new.tif: found no checksum in" in text
    (folder / "own.sha256").write_text("nonsense\n")
    report = check(read_description(config))
    assert (
        "own.sha256 line 1: found 'nonsense'; expected a SHA-256 and a path" in report.problems[0]
    )


def test_a_manifest_holds_the_tables_of_splits_too(folder: Path) -> None:
    for split, name in (("train", "t0"), ("validation", "t1"), ("test", "t2")):
        table = f"image,mask\nimages/{name}.tif,labels/{name}.tif\n"
        (folder / f"{split}.csv").write_text(table)
    splits = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    config = described(folder, images=None, labels=None, splits=splits)
    assert main(["manifest", str(config), "--quiet"]) == 0
    assert check(read_description(config)).problems == []
    (folder / "test.csv").write_text("image,mask\nimages/t3.tif,labels/t2.tif\n")
    problems = "\n".join(check(read_description(config)).problems)
    assert "test.csv: found sha256" in problems
    assert "images/t3.tif: found no checksum" in problems


def _reads(part: Any, index: int) -> bool:
    try:
        part[index]
    except DataError:
        return False
    return True


def test_the_command_says_what_is_wrong_by_its_status(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_raster(folder / "labels" / "t4.tif", np.full((8, 8), 7, np.uint8))
    assert main(["check", str(described(folder))]) == 2
    printed = capsys.readouterr()
    assert "labels/t4.tif: found label 7; expected classes 0 to 2" in printed.err
    assert "check: 100%" in printed.err
    assert printed.out.endswith("1 problem\n")
    assert main(["check", str(folder / "none.yaml")]) == 2
    assert "none.yaml: found no such file; expected a YAML file" in capsys.readouterr().err
