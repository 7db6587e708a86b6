"""How a task's datasets reach training: batches, caches, what is done on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spectralx.cli import InputError
from spectralx.data import domains_of, register_task, write_raster
from spectralx.datamodule import TaskData
from spectralx.evaluate import evaluate
from spectralx.fit import fit
from spectralx.options import load_settings
from spectralx.settings import Settings
from tests.spectralx.tiny import tiny_config

SIDE = 40


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of one scene that is cut into windows, and of another domain."""
    folder = tmp_path_factory.mktemp("own")
    draw = np.random.default_rng(0)
    for name in ("near", "far"):
        image = draw.integers(100, 9000, (4, 5 * SIDE, 2 * SIDE)).astype(np.uint16)
        write_raster(folder / f"{name}.tif", image, nodata=0)
        labels = draw.integers(0, 3, image.shape[1:]).astype(np.uint8)
        write_raster(folder / f"{name}_label.tif", labels)
    values = {
        "labels": "{stem}_label.tif",
        "domains": {"near": {"images": "near.tif"}, "far": {"images": "far.tif"}},
        "classes": ["water", "forest"],
        "wavelengths": [0.49, 0.56, 0.66, 0.84],
        "tile": SIDE,
        "divide": "tiles",
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(values))
    return folder / "own.yaml"


def settings_of(task: str, out: Path, *overrides: str) -> Settings:
    out.mkdir(exist_ok=True)
    common = [f"--data.task={task}", f"--out={out / 'run'}", "--data.cache=false"]
    common += ["--stage2.init_from=null", "--stage2.run.steps=2", "--stage2.run.pictures=0"]
    return load_settings(tiny_config(out), [*common, *overrides])


def first_batches(settings: Settings) -> list[Any]:
    """What Lightning hands to the model: first of training, first of validation."""
    data = TaskData(settings.data, settings.stage2.run)
    found = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        torch.manual_seed(3)
        batch = next(iter(loader))
        found += [batch["image"][0].dtype, data.on_after_batch_transfer(batch, 0)]
    return found


@pytest.mark.parametrize("normalisation", ["image", "fixed"])
@pytest.mark.parametrize("crop", ["resize", "resized-crop"])
def test_the_device_scales_as_the_workers_do(
    described: Path, tmp_path: Path, normalisation: str, crop: str
) -> None:
    common = [f"--data.normalisation={normalisation}", f"--data.crop={crop}"]
    found = {
        where: first_batches(
            settings_of(str(described), tmp_path, *common, f"--data.scale_on={where}")
        )
        for where in ("device", "workers")
    }
    assert [kind for kind in found["device"] if isinstance(kind, torch.dtype)] == [torch.uint16] * 2
    for one, other in zip(found["device"], found["workers"], strict=True):
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            assert one["image"].shape[1:] == (4, 32, 32)
            assert torch.equal(one["image"], other["image"])
            assert torch.equal(one["mask"], other["mask"])
            assert one["path"] == other["path"]


def test_training_on_windows_of_a_described_scene(
    described: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From worker processes, through the cache on disk, scaled on the device; then evaluated."""
    settings = settings_of(
        str(described),
        tmp_path,
        "--data.scale_on=device",
        f"--data.cache_folder={tmp_path / 'cache'}",
        "--data.workers=1",
    )
    result = fit("stage2", settings)
    assert "8 training, 1 validation, 1 test (source), 10 test (target)" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 20
    figures = json.loads((result.folder / "test.json").read_text())
    assert {*figures} == {"source", "target"}
    assert {*evaluate(result.best).tests} == {"source", "target"}


class Tiles:
    """In torchgeo's manner."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(4, SIDE, SIDE, generator=generator)
        return {"image": image, "mask": (image[0] > 0.5).long() + 1}


def test_training_on_other_peoples_datasets(tmp_path: Path) -> None:
    options: dict[str, Any] = {"wavelengths": [0.5, 0.6, 0.7, 0.8], "class_names": ["a", "b"]}
    register_task("tiles", domains_of(Tiles(), Tiles(), Tiles(), **options))
    settings = settings_of("tiles", tmp_path, "--data.scale_on=device", "--data.cache=true")
    result = fit("stage2", settings)
    assert result.evaluation is not None
    assert {*result.evaluation.tests} == {"source"}
    with pytest.raises(ValueError, match=r"data\.cache_folder: found a dataset without files"):
        TaskData(
            settings_of("tiles", tmp_path, f"--data.cache_folder={tmp_path}").data,
            settings.stage2.run,
        ).train_dataloader()


def test_one_cache_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.cache_folder: found here; expected null"):
        settings_of("tiles", tmp_path, "--data.cache=true", "--data.cache_folder=here")
