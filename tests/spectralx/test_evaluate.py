from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectralx import checkpoints
from spectralx.build import reconstruction_model, segmentation_model
from spectralx.data import FixedStatistics, ImageMinMax, Sample, build_task
from spectralx.datamodule import (
    TaskData,
    collate,
    describe_normalisation,
    restore_normalisation,
)
from spectralx.evaluate import evaluate, main, reconstruction_errors, segmentation_scores
from spectralx.lightning_modules import fixed_mask_noise, predict_masks
from spectralx.segmentation import Segmentation
from spectralx.settings import Settings
from tests.spectralx.tiny import tiny_settings


@pytest.fixture(scope="module")
def settings(tiny_scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return tiny_settings(tiny_scenes, tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def checkpoint(settings: Settings) -> Path:
    """An untrained segmentation, saved as training saves one."""
    torch.manual_seed(0)
    data = TaskData(settings.data, settings.stage2.run)
    model = segmentation_model(settings, data.task.wavelengths, data.task.num_classes)
    return checkpoints.save(
        Path(settings.out) / "untrained",
        model,
        wavelengths=list(data.task.wavelengths),
        class_names=list(data.task.class_names),
        normalisation=describe_normalisation(data.task.train),
        extra={"stage": "stage2", "settings": settings.as_dict()},
    )


def test_scores_agree_with_predictions_image_by_image(settings: Settings, checkpoint: Path) -> None:
    found = evaluate(checkpoint, batch_size=3, device="cpu")
    model = checkpoints.load(checkpoint).build()
    assert isinstance(model, Segmentation)
    task = build_task("WS-WD", settings.data.root, image_size=32)
    dataset = task.target_tests["target"]
    correct = labelled = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        prediction = model.predict(sample["image"][None], (32, 32))[0]
        scored = sample["mask"] > 0
        correct += int((prediction == sample["mask"])[scored].sum())
        labelled += int(scored.sum())
    scores = found.scores["target"]
    assert scores.pixels == labelled
    assert scores.overall_accuracy == pytest.approx(correct / labelled)


def test_the_command_prints_tables(checkpoint: Path, capsys: Any) -> None:
    assert main(["--checkpoint", str(checkpoint), "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    found = evaluate(checkpoint, device="cpu").tests
    summary = [line.split() for line in table.splitlines() if line.startswith("WS-WD ")]
    assert [row[1] for row in summary] == ["source", "target"]
    assert summary[1][3] == f"{100 * found['target']['miou']:.1f}"
    assert "woodland" in table


def test_the_command_scores_stage_1_without_a_report(
    settings: Settings, tmp_path: Path, capsys: Any
) -> None:
    data = TaskData(settings.data, settings.stage1.run)
    first = checkpoints.save(
        tmp_path / "stage1",
        reconstruction_model(settings, data.task.wavelengths),
        wavelengths=list(data.task.wavelengths),
        class_names=list(data.task.class_names),
        normalisation=describe_normalisation(data.task.train),
        extra={"stage": "stage1", "settings": settings.as_dict()},
    )
    assert main(["--checkpoint", str(first), "--device", "cpu"]) == 0
    assert "target: loss " in capsys.readouterr().out
    assert main(["--checkpoint", str(first), "--out", str(tmp_path / "report")]) == 2
    assert "found stage 1; expected stage 2" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_other_data_of_the_same_kind(checkpoint: Path, tiny_scenes: Path) -> None:
    found = evaluate(checkpoint, root=str(tiny_scenes), task="WD-WS", device="cpu")
    assert found.scores["target"].pixels > found.scores["source"].pixels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "checkpoint"),
        (["--checkpoint", "nowhere"], "nowhere: got no manifest.json, expected a checkpoint"),
        (["--checkpoint", "{own}", "--root", "nowhere"], "nowhere: found no such folder"),
        (["--checkpoint", "{own}", "--task", "WS"], "task: found 'WS'"),
        (["--checkpoint", "{own}", "--tsk", "WS"], "found unknown option --tsk"),
    ],
)
def test_wrong_input_ends_in_one_line(
    checkpoint: Path, capsys: Any, options: list[str], message: str
) -> None:
    assert main([option.replace("{own}", str(checkpoint)) for option in options]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed


def test_a_checkpoint_without_settings_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = checkpoints.load(checkpoint).build()
    bare = checkpoints.save(tmp_path / "bare", model)
    with pytest.raises(ValueError, match="without settings"):
        evaluate(bare)


def test_reconstruction_errors_are_means_over_images(settings: Settings) -> None:
    torch.manual_seed(0)
    data = TaskData(settings.data, settings.stage1.run)
    model = reconstruction_model(settings, data.task.wavelengths)
    loader = data.test_loader("target")
    errors = reconstruction_errors(model, loader)
    assert model.training  # the mode is restored
    model.eval()
    losses, counts = [], []
    for index, batch in enumerate(loader):
        images = batch["image"]
        with torch.no_grad():
            noise = fixed_mask_noise(index, (len(images), model.patches), images)
            losses.append(float(model(images, noise).loss) * len(images))
        counts.append(len(images))
    assert errors["loss"] == pytest.approx(sum(losses) / sum(counts))


def test_masks_of_different_sizes_are_scored_at_their_own() -> None:
    torch.manual_seed(0)
    masks = [torch.randint(0, 3, size) for size in ((8, 8), (5, 7))]
    samples: list[Sample] = [
        {"image": torch.rand(2, 4, 4), "mask": mask, "path": "a.tif"} for mask in masks
    ]
    batch = collate(samples)
    assert isinstance(batch["mask"], list)
    logits = torch.randn(2, 3, 4, 4)
    predictions = predict_masks(logits, batch["mask"])
    assert [tuple(prediction.shape) for prediction in predictions] == [(1, 8, 8), (1, 5, 7)]

    class Fixed(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return logits

    scores = segmentation_scores(Fixed(1, 1), [batch], ["none", "a", "b"])  # type: ignore[arg-type]
    assert scores.pixels == sum(int((mask > 0).sum()) for mask in masks)
    same = collate([samples[0], samples[0]])
    assert isinstance(same["mask"], torch.Tensor)


def test_normalisation_survives_a_checkpoint(tiny_scenes: Path) -> None:
    task = build_task("WS-WD", tiny_scenes, image_size=None, normalisation="fixed")
    restored = restore_normalisation(describe_normalisation(task.train))
    assert isinstance(restored, FixedStatistics)
    again = task.source_test.with_normalisation(restored)[0]["image"]
    assert torch.equal(again, task.source_test[0]["image"])
    assert isinstance(restore_normalisation({"kind": "image"}), ImageMinMax)
