"""Datasets in torchgeo's manner: dictionaries of image and mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spectralx.data import (
    DataError,
    ForeignDataset,
    build_task,
    domains_of,
    domains_of_datamodule,
    register_task,
)

OPTIONS: dict[str, Any] = {"wavelengths": [0.5, 0.6], "class_names": ["water", "forest"]}


class Tiles(Dataset[dict[str, Any]]):
    """As torchgeo's NonGeoDataset: float images, long masks, and keys nobody here needs."""

    def __init__(self, count: int, *, seed: int = 0, batched_mask: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(count, 2, 6, 6, generator=self.generator)
        self.masks = torch.randint(0, 3, (count, 6, 6), generator=self.generator)
        self.batched_mask = batched_mask

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask = self.masks[index]
        return {
            "image": self.images[index],
            "mask": mask[None] if self.batched_mask else mask,
            "crs": "EPSG:4326",
        }


class DataModule:
    """As torchgeo's NonGeoDataModule."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts
        self.stages: list[str] = []

    def prepare_data(self) -> None:
        raise AssertionError("nothing is downloaded")

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        if stage in ("fit", "validate"):
            self.train_dataset, self.val_dataset = self.parts["train"], self.parts["val"]
        if stage == "test":
            self.test_dataset = self.parts["test"]


def scaled(image: Tensor) -> Tensor:
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return (image - low) / (high - low)


def test_datasets_become_a_task() -> None:
    train = Tiles(4, batched_mask=True)
    domains = domains_of(train, Tiles(2), Tiles(2), targets={"far": Tiles(3, seed=1)}, **OPTIONS)
    register_task("tiles of mine", domains)
    task = build_task("tiles of mine", "", image_size=6, flips=False, turns=False)
    assert task.class_names == ("unlabelled", "water", "forest")
    assert {name: len(part) for name, part in task.target_tests.items()} == {"far": 3}
    sample = task.train[1]
    torch.testing.assert_close(sample["image"], scaled(train.images[1]))
    assert torch.equal(sample["mask"], train.masks[1])
    assert sample["path"] == "own train[1]"
    small = build_task("tiles of mine", "", image_size=3, normalisation="fixed")
    assert small.train[0]["image"].shape == (2, 3, 3)


def test_a_datamodule_becomes_a_task() -> None:
    parts = {"train": Tiles(4), "val": Tiles(2), "test": Tiles(3)}
    module = DataModule(parts)
    domains = domains_of_datamodule(module, name="mine", **OPTIONS)
    assert module.stages == ["fit", "validate", "test"]
    assert [len(part) for part in domains.source] == [4, 2, 3]
    for name, found in (("val", "val_dataset"), ("test", "test_dataset")):
        with pytest.raises(DataError, match=f"DataModule.{found}: found NoneType; expected"):
            domains_of_datamodule(DataModule({**parts, name: None}), **OPTIONS)


def test_labels_that_begin_with_a_class() -> None:
    """torchgeo's masks often have no unlabelled pixels: class 0 is a class."""
    tiles = Tiles(1)
    data = ForeignDataset(
        tiles,
        name="own",
        wavelengths=[0.5, 0.6],
        class_names=["water", "forest"],
        label_values={0: 1, 1: 2},
        other_labels=0,
    )
    expected = torch.where(tiles.masks[0] == 2, 0, tiles.masks[0] + 1)
    assert torch.equal(data[0]["mask"], expected)


def test_missing_values_and_arrays() -> None:
    class Arrays(Tiles):
        def __getitem__(self, index: int) -> dict[str, Any]:
            image = np.full((2, 6, 6), 5, np.int16)
            image[:, 0, 0], image[:, 5, 5] = -9999, 9
            return {"image": image, "mask": np.ones((6, 6), np.uint8)}

    data = ForeignDataset(Arrays(1), name="own", nodata=-9999, **OPTIONS)
    sample = data[0]
    assert sample["mask"][0, 0] == 0
    assert sample["image"][0, 5, 5] == 1
    assert sample["image"].sum() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image": torch.rand(3, 6, 6)},
            r"own\[0\]: image: found shape \[3, 6, 6\]; expected \[2,",
        ),
        ({"mask": torch.zeros(2, 6, 6)}, r"own\[0\]: mask: found shape \[2, 6, 6\]"),
        (
            {"mask": torch.full((6, 6), 3)},
            r"own\[0\]: mask: found label 3; expected classes 0 to 2",
        ),
        ({"mask": torch.full((6, 6), 0.5)}, r"own\[0\]: mask: found label value 0\.5"),
        ({"mask": torch.zeros(5, 6)}, r"own\[0\]: mask: found 5x6 pixels; expected 6x6"),
        (None, r"own\[0\]: found .*; expected a dictionary with image and mask"),
    ],
)
def test_samples_that_do_not_fit(change: dict[str, Any] | None, message: str) -> None:
    class Changed(Tiles):
        def __getitem__(self, index: int) -> Any:
            return [] if change is None else {**super().__getitem__(index), **change}

    with pytest.raises(DataError, match=message):
        ForeignDataset(Changed(1), name="own", **OPTIONS)
    with pytest.raises(DataError, match="own: found no images"):
        ForeignDataset(Tiles(0), name="own", **OPTIONS)


def test_names_of_tasks_stay_theirs() -> None:
    domains = domains_of(Tiles(1), Tiles(1), Tiles(1), **OPTIONS)
    for name in ("WS-WD", "mine.yaml"):
        with pytest.raises(ValueError, match="expected one that is not of a task"):
            register_task(name, domains)
