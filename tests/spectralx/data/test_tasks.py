from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralx.data import (
    DataError,
    FixedStatistics,
    ImageDataset,
    Task,
    TileDataset,
    Whitened,
    build_task,
    task_names,
)
from spectralx.data.tiles import Pair, split_by_file

from .conftest import COUNT, ROOT_OF_TASK, SIZE

Scenes = Callable[[str], Path]
GAP = ("WS-WD", "WD-WS", "spring", "summer", "autumn", "winter", "north-south", "south-north")
NO_GAP = ("whu-ohs", "dfc2020", "mts12")


def _files(dataset: ImageDataset) -> set[Path]:
    assert isinstance(dataset, TileDataset)
    return {pair.image for pair in dataset.pairs}


def _domain(path: Path, root: Path) -> str:
    """The domain a scene lies in, told by its path."""
    parts = path.relative_to(root).parts
    if parts[0] == "transfer-STall":
        return parts[1]
    if parts[0] == "image":
        return "south" if parts[1] == "test" else "north"
    return parts[0]


def _build(scenes: Scenes, name: str, **options: Any) -> Task:
    return build_task(name, scenes(ROOT_OF_TASK[name]), image_size=24, **options)


def test_the_eight_tasks_and_the_splits_without_a_gap_are_there() -> None:
    assert task_names() == (*GAP, *NO_GAP, "folder")


@pytest.mark.parametrize("name", GAP)
def test_source_and_target_are_apart(scenes: Scenes, name: str) -> None:
    task, root = _build(scenes, name), scenes(ROOT_OF_TASK[name])
    own = [_files(part) for part in (task.train, task.validation, task.source_test)]
    domains = {_domain(path, root) for part in own for path in part}
    expected = {
        "WS-WD": ({"source"}, {"target"}), "WD-WS": ({"target"}, {"source"}),
        "north-south": ({"north"}, {"south"}), "south-north": ({"south"}, {"north"}),
    }.get(name, ({name}, {"spring", "summer", "autumn", "winter"} - {name}))  # fmt: skip
    assert domains == expected[0]
    assert set(task.target_tests) == expected[1]
    for target, dataset in task.target_tests.items():
        assert {_domain(path, root) for path in _files(dataset)} == {target}
        assert len(dataset) == COUNT
    assert sum(map(len, own)) == len(set().union(*own)) == COUNT


@pytest.mark.parametrize("name", NO_GAP)
def test_without_a_gap_all_domains_are_together(scenes: Scenes, name: str) -> None:
    task, root = _build(scenes, name), scenes(ROOT_OF_TASK[name])
    assert not task.target_tests
    own = [_files(part) for part in (task.train, task.validation, task.source_test)]
    assert sum(map(len, own)) == len(set().union(*own))
    if name == "whu-ohs":
        letters = {path.name[0] for path in own[0]}
        assert letters == {"S", "T", "O"}
    else:
        assert len({_domain(path, root) for path in own[0]}) == (4 if name == "dfc2020" else 2)


def test_divisions_are_the_same_every_time(scenes: Scenes) -> None:
    first, second = _build(scenes, "spring"), _build(scenes, "spring")
    for part in ("train", "validation", "source_test"):
        assert getattr(first, part).pairs == getattr(second, part).pairs


def test_divisions_depend_on_file_names_alone() -> None:
    pairs = [Pair(Path(f"/a/x{i}.tif"), Path("l")) for i in range(100)]
    moved = [Pair(Path(f"/b/c/x{i}.tif"), Path("l")) for i in reversed(range(100))]
    first = split_by_file(pairs, (0.8, 0.1, 0.1), root=Path("/a"), name="")
    second = split_by_file(moved, (0.8, 0.1, 0.1), root=Path("/b/c"), name="")
    names = [[pair.image.name for pair in part] for part in first]
    assert names == [[pair.image.name for pair in part] for part in second]
    assert [len(part) for part in names] == [80, 10, 10]
    # Pinned: a change here moves files between training and test in everybody's runs.
    assert names[2][:3] == ["x0.tif", "x46.tif", "x53.tif"]


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_small_domains_have_a_file_in_each_part(count: int) -> None:
    pairs = [Pair(Path(f"/a/{i}.tif"), Path("l")) for i in range(count)]
    parts = split_by_file(pairs, (0.8, 0.1, 0.1), root=Path("/a"), name="")
    assert min(map(len, parts)) >= 1
    assert sum(map(len, parts)) == count


def test_too_few_files_to_divide_are_named() -> None:
    pairs = [Pair(Path("/a/0.tif"), Path("l"))] * 2
    with pytest.raises(DataError, match="found 2 images in spring; expected at least 3"):
        split_by_file(pairs, (0.8, 0.1, 0.1), root=Path("/a"), name="spring")


def test_sizes_of_samples(scenes: Scenes) -> None:
    task = _build(scenes, "WS-WD")
    assert task.train[0]["image"].shape == (32, 24, 24)
    assert task.train[0]["mask"].shape == (24, 24)
    for dataset in (task.validation, task.source_test, *task.target_tests.values()):
        assert dataset[0]["image"].shape == (32, 24, 24)
        assert dataset[0]["mask"].shape == (SIZE, SIZE)
    native = build_task("WS-WD", scenes("whu-ohs"), image_size=None)
    assert native.train[0]["image"].shape == (32, SIZE, SIZE)


def test_metadata_is_shared(scenes: Scenes) -> None:
    task = _build(scenes, "north-south")
    assert (task.bands, task.num_classes) == (24, 9)
    assert task.wavelengths == task.target_tests["south"].wavelengths
    assert task.class_names == task.validation.class_names


@pytest.mark.parametrize("crop", ["resize", "crop", "resized-crop"])
def test_training_samples_vary_by_the_global_seed_alone(scenes: Scenes, crop: str) -> None:
    task = _build(scenes, "spring", crop=crop)
    images = []
    for seed in (0, 0, 1, 2, 3, 4):
        torch.manual_seed(seed)
        images.append(task.train[1]["image"])
    assert torch.equal(images[0], images[1])
    assert any(not torch.equal(images[0], other) for other in images[2:])
    assert torch.equal(task.validation[0]["image"], task.validation[0]["image"])


def test_augmentation_can_be_switched_off(scenes: Scenes) -> None:
    task = _build(scenes, "spring", flips=False, turns=False)
    assert all(torch.equal(task.train[0]["image"], task.train[0]["image"]) for _ in range(4))


def test_fixed_normalisation_is_measured_on_the_training_files(scenes: Scenes) -> None:
    task = _build(scenes, "WS-WD", normalisation="fixed")
    scaling = task.train.normalisation
    assert isinstance(scaling, FixedStatistics)
    assert task.target_tests["target"].normalisation is scaling
    means = [task.train.read_values(i)[0].mean((1, 2)) for i in range(len(task.train))]
    assert scaling.mean == pytest.approx(sum(means) / len(means), rel=1e-4)


def test_whitening_is_measured_on_the_training_files(scenes: Scenes) -> None:
    task = _build(scenes, "WS-WD", normalisation="whitened", flips=False, turns=False)
    scaling = task.train.normalisation
    assert isinstance(scaling, Whitened)
    assert task.target_tests["target"].normalisation is scaling
    means = [task.train.read_values(i)[0].mean((1, 2)) for i in range(len(task.train))]
    assert scaling.statistics.mean == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert torch.equal(task.train[0]["image"], task.train[0]["image"])


def test_jitter_is_of_training_images_alone(scenes: Scenes) -> None:
    still, moved = (
        _build(scenes, "spring", flips=False, turns=False, spectral_jitter=jitter)
        for jitter in (0.0, 0.1)
    )
    difference = moved.train[0]["image"] - still.train[0]["image"]
    assert not torch.equal(moved.train[0]["image"], moved.train[0]["image"])
    # Resizing leaves what is the same everywhere.
    assert (difference.amax((1, 2)) - difference.amin((1, 2))).max() < 1e-5
    for one, other in (
        (still.validation, moved.validation),
        (still.source_test, moved.source_test),
    ):
        assert torch.equal(one[0]["image"], other[0]["image"])


def test_the_published_protocol(scenes: Scenes) -> None:
    task, root = _build(scenes, "spring", official=True), scenes("dfc2020")
    assert {_domain(path, root) for path in _files(task.validation)} == set(task.target_tests)
    assert task.validation[0]["mask"].shape == (24, 24)
    assert isinstance(task.train, TileDataset)
    assert task.train.label_values is not None
    assert task.train.label_values[3] == 3
    default = _build(scenes, "spring")
    assert isinstance(default.train, TileDataset)
    assert default.train.label_values is not None
    assert 3 not in default.train.label_values


def test_divided_transfers_use_their_division(scenes: Scenes, tmp_path: Path) -> None:
    for side in ("source", "target"):
        for kind in ("image", "label"):
            files = sorted((scenes("whu-ohs") / "transfer-STall" / side / kind).iterdir())
            parts = {"tr": files[:3], "val": files[3:5], "ts": files[5:6]}
            for split, part in parts.items():
                folder = tmp_path / "transfer-STall" / side / split / kind
                folder.mkdir(parents=True)
                for file in part:
                    (folder / file.name).symlink_to(file)
    task = build_task("WS-WD", tmp_path)
    assert [len(part) for part in (task.train, task.validation, task.source_test)] == [3, 2, 1]
    assert len(task.target_tests["target"]) == 1


def test_errors(scenes: Scenes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task: found 'WS->WD' \(did you mean 'WS-WD'\?\)"):
        build_task("WS->WD", tmp_path)
    with pytest.raises(DataError, match=r"gone: found no such folder; expected the data of task"):
        build_task("spring", tmp_path / "gone")
    with pytest.raises(DataError, match=r"spring/image: found no such folder; expected the images"):
        build_task("spring", tmp_path)
    with pytest.raises(ValueError, match="crop: found 'middle'; expected one of resize, crop"):
        build_task("spring", tmp_path, crop="middle")
    with pytest.raises(ValueError, match="normalisation: found 'std'; expected one of image"):
        build_task("spring", tmp_path, normalisation="std")
    with pytest.raises(ValueError, match="nodata: found with task 'spring'; expected with task"):
        build_task("spring", tmp_path, nodata=0)
    with pytest.raises(ValueError, match="size: found 0; expected"):
        build_task("spring", scenes("dfc2020"), image_size=0)
