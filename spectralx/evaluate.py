"""Score a checkpoint on the tests of a task; a command: ``python -m spectralx.evaluate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from spectralx import checkpoints, pictures
from spectralx.cli import InputError, run_command, write_text
from spectralx.data import Task
from spectralx.datamodule import Batch, TaskData, restore_normalisation
from spectralx.lightning_modules import (
    fixed_mask_noise,
    masked_error,
    predict_masks,
    separate_masks,
)
from spectralx.metrics import Scores, SegmentationScores, score_table
from spectralx.options import parse, settings_from_dict
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation
from spectralx.settings import RunSettings, Settings


@contextmanager
def _inference(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; the device of `model`. The mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def segmentation_scores(
    model: Segmentation,
    batches: Iterable[Batch],
    class_names: Sequence[str],
    *,
    official: bool = False,
) -> Scores:
    """Scores of `model` over all batches, at the size of their masks."""
    scores = SegmentationScores(class_names, protocol="official" if official else "proper")
    with _inference(model) as device:
        for batch in batches:
            predictions = predict_masks(model(batch["image"].to(device)), batch["mask"])
            for prediction, truth in zip(predictions, separate_masks(batch["mask"]), strict=True):
                scores.update(prediction.cpu(), truth)
    return scores.compute()


def reconstruction_errors(
    model: MaskedReconstruction, batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean ``loss`` and ``masked_loss`` of `model` over all images, under fixed masks."""
    sums, count = {"loss": 0.0, "masked_loss": 0.0}, 0
    with _inference(model) as device:
        for index, batch in enumerate(batches):
            images = batch["image"].to(device)
            result = model(images, fixed_mask_noise(index, (len(images), model.patches), images))
            sums["loss"] += float(result.loss) * len(images)
            sums["masked_loss"] += float(masked_error(model, result, images)) * len(images)
            count += len(images)
    return {name: total / max(count, 1) for name, total in sums.items()}


def _first_images(batches: Iterable[Batch], count: int) -> tuple[Tensor, list[Tensor]]:
    """Images [B, C, H, W] and their masks, up to `count` of them."""
    images: list[Tensor] = []
    masks: list[Tensor] = []
    for batch in batches:
        images += list(batch["image"])
        masks += list(batch["mask"])
        if len(images) >= count:
            break
    return torch.stack(images[:count]), masks[:count]


def draw_segmentation(
    path: Path, model: Segmentation, batches: Iterable[Batch], task: Task, count: int
) -> None:
    """Picture of the first `count` predictions beside their truth."""
    images, masks = _first_images(batches, count)
    with _inference(model) as device:
        predictions = predict_masks(model(images.to(device)), masks)
    pictures.segmentation(
        path, images, [one[0] for one in predictions], masks, task.class_names, task.wavelengths
    )


def draw_reconstruction(
    path: Path, model: MaskedReconstruction, batches: Iterable[Batch], task: Task, count: int
) -> None:
    """Picture of the first `count` reconstructions, under fixed masks."""
    images, _ = _first_images(batches, count)
    with _inference(model) as device:
        images = images.to(device)
        noise = fixed_mask_noise(0, (len(images), model.patches), images)
        shown = model.reconstruct(images, noise)
    pictures.reconstruction(path, shown.images, shown.predicted, shown.mask, task.wavelengths)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model reached on the tests of a task.

    Attributes
    ----------
    tests : test set ("source", "target", or "target ..." each) -> figures by name.
    scores : of a segmentation, the scores behind them.
    """

    tests: dict[str, dict[str, float]]
    scores: dict[str, Scores]

    def table(self) -> str:
        """Scores of each class and overall, or the errors; one column or line a test set."""
        if self.scores:
            return score_table(self.scores)
        return "\n".join(
            f"{name}: " + ", ".join(f"{key} {value:.5f}" for key, value in figures.items())
            for name, figures in self.tests.items()
        )


def run_tests(
    model: Segmentation | MaskedReconstruction,
    data: TaskData,
    *,
    official: bool = False,
    pictures_to: Path | None = None,
    count: int = 3,
) -> Evaluation:
    """Run `model` on all test sets of `data`.

    Parameters
    ----------
    model : of either stage; runs on the device it is on.
    data : of the task.
    official : score as the published protocol does.
    pictures_to : folder for a picture of the first `count` images of each test set.
    """
    tests: dict[str, dict[str, float]] = {}
    scores: dict[str, Scores] = {}
    for name in data.tests:
        loader = data.test_loader(name)
        if isinstance(model, Segmentation):
            scores[name] = segmentation_scores(
                model, loader, data.task.class_names, official=official
            )
            tests[name] = scores[name].summary()
        else:
            tests[name] = reconstruction_errors(model, loader)
        if pictures_to is not None and count > 0:
            file = pictures_to / f"{name.replace(' ', '-')}.png"
            if isinstance(model, Segmentation):
                draw_segmentation(file, model, loader, data.task, count)
            else:
                draw_reconstruction(file, model, loader, data.task, count)
    return Evaluation(tests, scores)


def evaluate(
    checkpoint: str | Path,
    *,
    root: str | None = None,
    task: str | None = None,
    batch_size: int = 16,
    device: str | None = None,
    pictures_to: str | Path | None = None,
) -> Evaluation:
    """Score a checkpoint of either stage.

    Parameters
    ----------
    checkpoint : its folder.
    root, task : data other than the checkpoint was trained on; the same layout and classes.
    batch_size : images at a time.
    device : "cpu", "cuda", ...; the GPU where there is one by default.
    pictures_to : folder for pictures of the first images of each test set.

    Raises
    ------
    ValueError : a checkpoint or data that cannot be used, or that do not fit each other.
    """
    loaded = checkpoints.load(checkpoint)
    settings = _settings_of(loaded)
    wanted = dataclasses.replace(
        settings.data,
        root=settings.data.root if root is None else root,
        task=settings.data.task if task is None else task,
    )
    model = loaded.build()
    data = TaskData(
        wanted,
        RunSettings(batch_size=batch_size),
        normalisation=restore_normalisation(loaded.manifest["normalisation"]),
    )
    _check_fit(loaded, data.task)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    assert isinstance(model, (Segmentation, MaskedReconstruction))
    folder = None if pictures_to is None else Path(pictures_to)
    return run_tests(model, data, official=wanted.official, pictures_to=folder)


def _settings_of(checkpoint: checkpoints.Checkpoint) -> Settings:
    extra: Any = checkpoint.manifest.get("extra") or {}
    if "settings" not in extra or "normalisation" not in checkpoint.manifest:
        raise InputError(
            f"{checkpoint.path}: found a checkpoint without settings; expected one that "
            "spectralx.train wrote"
        )
    return settings_from_dict(extra["settings"], str(checkpoint.path / checkpoints.MANIFEST))


def _check_fit(checkpoint: checkpoints.Checkpoint, task: Task) -> None:
    """The bands of `task` are those of `checkpoint`, and so are the classes."""
    manifest = checkpoint.manifest
    for what, found, expected in (
        ("bands", task.bands, len(manifest["wavelengths"])),
        ("classes", task.num_classes, len(manifest["class_names"])),
    ):
        if found != expected:
            raise InputError(
                f"{checkpoint.path}: found task {task.name} of {found} {what}; expected "
                f"{expected}, as the checkpoint was trained on"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m spectralx.evaluate``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog="spectralx.evaluate", exit_on_error=False)
    parser.add_argument("--checkpoint", type=str, required=True, help="folder of a checkpoint")
    parser.add_argument("--root", type=str | None, help="data; by default what it was trained on")
    parser.add_argument("--task", type=str | None, help="task; by default the trained one")
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time")
    parser.add_argument("--device", type=str | None, help="cpu or cuda; by default the fastest")
    parser.add_argument("--pictures", type=str | None, help="folder for pictures")
    parser.add_argument("--json", type=str | None, help="file for the figures")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")

    def body() -> None:
        options = parse(parser, arguments)
        found = evaluate(
            options["checkpoint"],
            root=options["root"],
            task=options["task"],
            batch_size=options["batch_size"],
            device=options["device"],
            pictures_to=options["pictures"],
        )
        print(found.table())
        if options["json"] is not None:
            write_text(options["json"], json.dumps(found.tests, indent=2) + "\n")

    return run_command("spectralx.evaluate", body, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
