"""Files that cannot be read: an error by default; where asked for, left out, named and counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralx import checkpoints
from spectralx.data import DataError, build_task
from spectralx.data.damage import SkipDamaged
from spectralx.data.manifest import write_manifest
from spectralx.data.raster import UnreadableError
from spectralx.datamodule import TaskData
from spectralx.evaluate import evaluate_tasks
from spectralx.evaluate import main as evaluate_main
from spectralx.fit import fit
from spectralx.options import load_settings
from spectralx.settings import Settings
from spectralx.train import main, report
from tests.spectralx.data.test_own_data import described, scene
from tests.spectralx.tiny import tiny_config

TRAIN, VALIDATION, TEST = ("t0", "t1", "t2", "t3", "t4"), ("v0", "v1"), ("s0", "s1")


def write(folder: Path, leave_out: tuple[str, ...] = (), **changes: Any) -> Path:
    """The YAML file of nine whole tiles, but for those left out."""
    for name in (*TRAIN, *VALIDATION, *TEST):
        if name not in leave_out:
            scene(folder, name, 32)
    splits = {"train": "images/t*.tif", "validation": "images/v*.tif", "test": "images/s*.tif"}
    return described(folder, images=None, splits=splits, **changes)


def cut(folder: Path, *names: str) -> list[Path]:
    """Files "images/t0" of `folder` with their second half gone."""
    paths = [folder / f"{name}.tif" for name in names]
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    return paths


def settings_of(config: Path, out: Path, *overrides: str) -> Settings:
    out.mkdir(exist_ok=True)
    common = [f"--data.task={config}", f"--out={out / 'run'}", "--data.cache=false"]
    common += ["--stage2.init_from=null", "--stage2.run.steps=2"]
    common += ["--stage2.run.pictures=0"]
    return load_settings(tiny_config(out), [*common, *overrides])


def weights(settings: Settings) -> dict[str, torch.Tensor]:
    return checkpoints.load(fit("stage2", settings).last).tensors


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_left_out_where_asked_named_once_and_counted(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path / "data")
    files = cut(tmp_path / "data", "images/t0", "labels/t3", "images/v1")
    with pytest.raises(UnreadableError, match=r"t0\.tif"):
        fit("stage2", settings_of(config, tmp_path / "plain"))
    assert not (tmp_path / "plain" / "run").exists()
    workers = "--data.workers=2"
    asked = settings_of(config, tmp_path / "asked", "--data.skip_damaged=true", workers)
    capsys.readouterr()
    result = fit("stage2", asked)
    printed = capsys.readouterr().out
    for path, name in zip(files, ("train", "train", "validation"), strict=True):
        assert printed.count(str(path)) == 1
        assert f"stage2: left out of {name}: {path}: found " in printed
        assert str(path) in result.skipped[name]
    assert "3 training (2 damaged files left out), 1 validation (1 damaged" in printed
    assert "stage2 train: 2 damaged files left out" in report("stage2", result)
    kept = json.loads((result.folder / "finished.json").read_text())
    assert kept["skipped"] == result.skipped
    extra = checkpoints.load(result.best).manifest["extra"]
    assert extra["skipped"] == {"train": 2, "validation": 1}
    assert fit("stage2", asked).skipped == result.skipped  # finished before


def test_the_order_is_that_of_the_files_that_are_left(tmp_path: Path) -> None:
    damaged, without = (tmp_path / name / "data" for name in ("damaged", "without"))
    config = write(damaged)
    cut(damaged, "images/t1")
    other = write(without, leave_out=("t1",))
    asked = settings_of(config, tmp_path / "damaged", "--data.skip_damaged=true")
    assert same(weights(asked), weights(settings_of(other, tmp_path / "without")))


def test_a_run_that_goes_on_goes_without_the_same(tmp_path: Path) -> None:
    config = write(tmp_path / "data")
    image = tmp_path / "data" / "images" / "t1.tif"
    whole = image.read_bytes()
    cut(tmp_path / "data", "images/t1")
    asked = "--data.skip_damaged=true"
    expected = weights(settings_of(config, tmp_path / "alone", asked))
    weights(settings_of(config, tmp_path / "parts", asked, "--stage2.run.steps=1"))
    image.write_bytes(whole)  # repaired meanwhile: it stays out of this run
    assert same(weights(settings_of(config, tmp_path / "parts", asked)), expected)
    # One that was damaged meanwhile is an error: it has been learnt from.
    cut(tmp_path / "data", "images/t2")
    with pytest.raises(UnreadableError, match=r"t2\.tif"):
        fit("stage2", settings_of(config, tmp_path / "parts", asked, "--stage2.run.steps=4"))
    image.with_name("t2.tif").unlink()
    with pytest.raises(ValueError, match="other images of training and validation than the run"):
        fit("stage2", settings_of(config, tmp_path / "parts", asked, "--stage2.run.steps=4"))


def test_tests_are_whole_unless_asked_for(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path / "data")
    asked = settings_of(config, tmp_path / "run", "--data.skip_damaged=true")
    best = str(fit("stage2", asked).best)
    (image,) = cut(tmp_path / "data", "images/s0")
    cut(tmp_path / "data", "images/t0")  # training is not looked at
    with pytest.raises(UnreadableError, match=r"s0\.tif"):
        TaskData(asked.data, asked.stage2.run).check()
    capsys.readouterr()
    assert evaluate_main(["--checkpoint", best]) == 2
    assert str(image) in capsys.readouterr().err
    out = tmp_path / "report"
    assert evaluate_main(["--checkpoint", best, "--skip_damaged", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count(str(image)) == 1
    (task,) = json.loads((out / "results.json").read_text())["tasks"]
    assert list(task["skipped"]["source"]) == [str(image)]
    for name in ("report.html", "report.md"):
        assert "source: 1 damaged files left out" in (out / name).read_text()
    (result,) = evaluate_tasks([best], skip_damaged=True, progress=False)
    assert result.matrix("native", "source", result.seeds[0]).sum() <= 32 * 32


def test_windows_and_checksums(tmp_path: Path) -> None:
    """A scene goes with all of its windows; a changed bit is damage where a manifest tells."""
    config = write(tmp_path, tile=16)
    write_manifest(tmp_path)
    (image,) = cut(tmp_path, "images/t0")
    flipped = tmp_path / "images" / "t3.tif"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    skip = SkipDamaged()
    task = build_task(str(config), "", image_size=None, skip=skip)
    assert set(task.skipped["train"]) == {str(image), str(flipped)}
    assert "sha256" in task.skipped["train"][str(flipped)]
    assert len(task.train) == 3 * 4
    assert len(task.validation) == 2 * 4


def test_what_is_no_damage_stays_an_error(tmp_path: Path) -> None:
    config = write(tmp_path)
    shutil.copy(tmp_path / "labels" / "t1.tif", tmp_path / "images" / "t2.tif")  # one band
    settings = settings_of(config, tmp_path / "run", "--data.skip_damaged=true")
    with pytest.raises(DataError, match="1 bands"):
        fit("stage2", settings)
    scene(tmp_path, "t2", 32)
    cut(tmp_path, *(f"images/{name}" for name in TRAIN))
    with pytest.raises(DataError, match=r"t0\.tif"):
        fit("stage2", settings)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    config = write(tmp_path / "data")
    (image,) = cut(tmp_path / "data", "images/t4")
    out = tmp_path / "run"
    command = ["stage2", "--config", str(tiny_config(tmp_path)), "--data.task", str(config)]
    command += ["--stage2.init_from", "null", "--data.cache", "false", "--out", str(out)]
    assert main(command) == 2
    assert str(image) in capsys.readouterr().err
    assert main([*command, "--data.skip_damaged", "true"]) == 0
    assert "stage2 train: 1 damaged files left out" in capsys.readouterr().out
