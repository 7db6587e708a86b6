from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spectralx import checkpoints, pictures
from spectralx.build import segmentation_model
from spectralx.data import build_task
from spectralx.datamodule import TaskData
from spectralx.fit import FitResult, fit
from spectralx.lightning_modules import (
    NonFiniteLossError,
    ReconstructionStage,
    SegmentationStage,
    learning_rate_factor,
)
from spectralx.options import settings_from_dict
from spectralx.reconstruction import MaskedReconstruction, Reconstruction
from spectralx.segmentation import Segmentation
from spectralx.settings import OptimizerSettings, Settings
from spectralx.train import main, report
from tests.spectralx.tiny import tiny_config, tiny_settings


@pytest.fixture(scope="module")
def trained(
    tiny_scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, FitResult, FitResult]:
    """Both stages of the tiny experiment."""
    settings = tiny_settings(tiny_scenes, tmp_path_factory.mktemp("trained"))
    return settings, fit("stage1", settings), fit("stage2", settings)


def test_a_stage_leaves_checkpoints_logs_and_pictures(
    trained: tuple[Settings, FitResult, FitResult],
) -> None:
    settings, *results = trained
    for result, model in zip(results, (MaskedReconstruction, Segmentation), strict=True):
        for folder in (result.best, result.last):
            assert type(checkpoints.load(folder).build()) is model
        kept = yaml.safe_load((result.folder / "settings.yaml").read_text())
        assert settings_from_dict(kept, "settings.yaml") == settings
        curves = pictures.read_curves(result.folder / "metrics.csv")
        assert curves["val/loss"][0][0] == 0
        assert len(curves["val/loss"][0]) == 3  # before training, then twice
        assert len(curves["train/loss"][0]) == 4
        assert list(result.folder.glob("tensorboard/version_0/events.*"))
        assert (result.folder / "pictures" / "curves.png").stat().st_size > 1000
        for name in ("source", "target"):
            assert (result.folder / "pictures" / f"{name}.png").stat().st_size > 1000
        assert not list(result.folder.rglob("*partial*"))


def test_checkpoints_hold_what_evaluation_needs(
    trained: tuple[Settings, FitResult, FitResult],
) -> None:
    settings, _, result = trained
    manifest = checkpoints.load(result.last).manifest
    assert manifest["extra"]["step"] == 4
    assert manifest["extra"]["settings"] == settings.as_dict()
    assert manifest["normalisation"] == {"kind": "image"}
    assert len(manifest["wavelengths"]) == 32
    assert manifest["class_names"][0] == "unlabelled"
    assert manifest["extra"]["scores"]["val/miou"] == pytest.approx(result.after["miou"])


def test_both_domains_are_tested(trained: tuple[Settings, FitResult, FitResult]) -> None:
    _, stage1, stage2 = trained
    assert stage1.evaluation is not None
    assert stage2.evaluation is not None
    assert list(stage1.evaluation.tests) == ["source", "target"]
    assert set(stage1.evaluation.tests["source"]) == {"loss", "masked_loss"}
    assert set(stage2.evaluation.tests["source"]) == {"miou", "overall_accuracy", "f1", "kappa"}
    text = report("stage2", stage2)
    assert "target" in text
    assert "overall accuracy" in text
    assert set(stage1.before) == {"loss", "masked_loss"}
    assert {"loss", "miou", "overall_accuracy", "f1", "kappa"} == set(stage2.before)


def test_scores_are_at_the_labels_size(
    tiny_scenes: Path, trained: tuple[Settings, FitResult, FitResult]
) -> None:
    _, _, stage2 = trained
    assert stage2.evaluation is not None
    task = build_task("WS-WD", tiny_scenes, image_size=None)
    test = task.source_test
    labelled = sum(int((test[index]["mask"] > 0).sum()) for index in range(len(test)))
    assert stage2.evaluation.scores["source"].pixels == labelled


def test_stage2_starts_from_stage1(
    tiny_scenes: Path, tmp_path: Path, trained: tuple[Settings, FitResult, FitResult]
) -> None:
    _, stage1, _ = trained
    settings = tiny_settings(
        tiny_scenes,
        tmp_path,
        f"--stage2.init_from={stage1.best}",
        "--stage2.optimizer.lr=1e-12",
        "--stage2.run.steps=1",
    )
    start = checkpoints.load(stage1.best).tensors
    moved = checkpoints.load(fit("stage2", settings).last).tensors
    name = "blocks.0.attn.qkv.weight"
    torch.testing.assert_close(moved[f"vit_backbone.{name}"], start[name], rtol=0, atol=1e-9)


def test_the_same_seed_trains_the_same_weights(tiny_scenes: Path, tmp_path: Path) -> None:
    def weights(folder: str) -> dict[str, torch.Tensor]:
        settings = tiny_settings(
            tiny_scenes, tmp_path / folder, "--stage1.run.steps=2", "--stage1.run.pictures=0"
        )
        return checkpoints.load(fit("stage1", settings).last).tensors

    first, second = weights("a"), weights("b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("option", "bad"),
    [("", 3), ("--stage1.run.accumulate=2", 6), ("--trainer.precision=16-mixed", 3)],
)
def test_a_loss_that_is_not_finite_stops_and_names_the_files(
    tiny_scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    option: str,
    bad: int,
) -> None:
    forward = MaskedReconstruction.forward
    steps = []

    def broken(self: MaskedReconstruction, images: Any, noise: Any = None) -> Reconstruction:
        result = forward(self, images, noise)
        if self.training:
            steps.append(1)
        return result._replace(loss=result.loss * float("nan")) if len(steps) == bad else result

    monkeypatch.setattr(MaskedReconstruction, "forward", broken)
    config = tiny_config(tmp_path)
    arguments = ["--config", str(config), "--data.root", str(tiny_scenes), *option.split()]
    status = main(["stage1", *arguments, "--out", str(tmp_path / "run")])
    message = capsys.readouterr().err.strip()
    assert status == 1
    assert message.startswith("spectralx.train: error: loss: found nan at step 2")
    assert str(tiny_scenes / "transfer-STall") in message
    assert "\n" not in message
    # The checkpoint of step 2 is whole, and its weights are finite.
    tensors = checkpoints.load(tmp_path / "run" / "stage1" / "last").tensors
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    steps.clear()
    with pytest.raises(NonFiniteLossError):
        main(["stage1", *arguments, "--out", str(tmp_path / "again"), "--debug"])


def test_the_plateau_schedule_lowers_the_rate(
    tiny_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def constant(self: ReconstructionStage, name: str, value: Any, size: int) -> None:
        self.means[name].update(1.0, size)

    monkeypatch.setattr(ReconstructionStage, "log_validation", constant)
    settings = tiny_settings(
        tiny_scenes,
        tmp_path,
        "--stage1.optimizer.schedule=plateau",
        "--stage1.optimizer.patience=0",
        "--stage1.run.validate_every=1",
        "--stage1.run.pictures=0",
    )
    result = fit("stage1", settings)
    rates = pictures.read_curves(result.folder / "metrics.csv")["lr"][1]
    # The first validation sets the mark; each later one does not beat it.
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])


def test_learning_rate_factors() -> None:
    constant = OptimizerSettings(warmup=4)
    assert [learning_rate_factor(step, constant, 10) for step in (0, 1, 3, 4, 9)] == [
        0.25,
        0.5,
        1.0,
        1.0,
        1.0,
    ]
    cosine = dataclasses.replace(constant, schedule="cosine")
    assert learning_rate_factor(4, cosine, 12) == 1.0
    assert learning_rate_factor(8, cosine, 12) == pytest.approx(0.5)
    assert learning_rate_factor(12, cosine, 12) == pytest.approx(0.0)


def test_class_weights_and_the_official_protocol(tiny_scenes: Path, tmp_path: Path) -> None:
    settings = tiny_settings(
        tiny_scenes,
        tmp_path,
        "--stage2.init_from=null",
        "--stage2.class_weights=balanced",
        "--stage2.label_smoothing=0.1",
        "--data.official=true",
        "--data.cache=false",
        "--data.normalisation=fixed",
        "--stage2.run.pictures=0",
    )
    result = fit("stage2", settings)
    assert result.evaluation is not None
    assert result.evaluation.scores["source"].protocol == "official"
    normalisation = checkpoints.load(result.best).manifest["normalisation"]
    assert len(normalisation["mean"]) == len(normalisation["std"]) == 32
    assert not list((result.folder / "pictures").glob("source*"))


def test_segmentation_weights_reach_the_loss(tiny_scenes: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_scenes, tmp_path)
    data = TaskData(settings.data, settings.stage2.run)
    weights = data.class_weights()
    assert weights[0] == 0
    present = weights[weights > 0]
    assert float(present.mean()) == pytest.approx(1.0)
    counts = torch.zeros(data.task.num_classes)
    for index in range(len(data.task.train)):
        mask = data.task.train[index]["mask"]
        counts += torch.bincount(mask.flatten(), minlength=len(counts))
    counts[0] = 0
    scaled = weights[counts > 0] * counts[counts > 0].sqrt()
    torch.testing.assert_close(scaled, scaled.mean().expand_as(scaled), rtol=1e-4, atol=0)

    model = segmentation_model(settings, data.task.wavelengths, data.task.num_classes).eval()
    batch = next(iter(data.train_dataloader()))
    losses = []
    for chosen in (weights, None):
        stage = SegmentationStage(
            model,
            settings.stage2.optimizer,
            4,
            class_names=list(data.task.class_names),
            class_weights=chosen,
        )
        stage.log_training_loss = lambda loss, batch: loss  # type: ignore[method-assign]
        losses.append(float(stage.training_step(batch, 0)))
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.interpolate(model(batch["image"]), (32, 32), mode="bilinear"),
        batch["mask"],
        weight=weights,
        ignore_index=0,
    )
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
