"""A model on the test sets of a task: scores, errors, confusion matrices and pictures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectralx import pictures
from spectralx.data import Task
from spectralx.data.augment import Resize
from spectralx.datamodule import Batch, TaskData
from spectralx.lightning_modules import (
    fixed_mask_noise,
    masked_error,
    predict_masks,
    separate_masks,
)
from spectralx.metrics import Scores, SegmentationScores, score_table
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation

Size = Literal["native", "model"]


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


def file_name(text: str) -> str:
    """`text`, a test set or a task, which may be the path of a file, as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "unnamed"


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
            logits = model(batch["image"].to(device))
            _count(scores, logits, batch["mask"])
    return scores.compute()


def _count(scores: SegmentationScores, logits: Tensor, mask: Tensor | list[Tensor]) -> None:
    for prediction, truth in zip(predict_masks(logits, mask), separate_masks(mask), strict=True):
        scores.update(prediction.cpu(), truth)


class BothSizes(NamedTuple):
    """Confusion matrices int64 [K, K] by size, and the sizes (height, width) of the masks."""

    matrices: dict[Size, Tensor]
    native_sizes: set[tuple[int, int]]


def confusion_at_both_sizes(
    model: Segmentation, batches: Iterable[Batch], class_names: Sequence[str]
) -> BothSizes:
    """Confusion matrices of `model` over all batches, from one pass.

    "native": at the size of the masks. "model": at the size of the images the model sees, masks
    resized to it (nearest), as the published protocol scores.

    Parameters
    ----------
    model : on the device it is to run on.
    batches : with masks at the size of their files.
    class_names : one name a class.
    """
    native, small = SegmentationScores(class_names), SegmentationScores(class_names)
    sizes: set[tuple[int, int]] = set()
    resize, unused = Resize(model.image_size), torch.Generator()
    with _inference(model) as device:
        for batch in batches:
            logits = model(batch["image"].to(device))
            _count(native, logits, batch["mask"])
            pairs = zip(batch["image"], batch["mask"], strict=True)
            resized = [resize(image, mask, unused)[1] for image, mask in pairs]
            _count(small, logits, torch.stack(resized))
            sizes |= {(mask.shape[-2], mask.shape[-1]) for mask in batch["mask"]}
    return BothSizes({"native": native.matrix, "model": small.matrix}, sizes)


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
            file = pictures_to / f"{file_name(name)}.png"
            if isinstance(model, Segmentation):
                draw_segmentation(file, model, loader, data.task, count)
            else:
                draw_reconstruction(file, model, loader, data.task, count)
    return Evaluation(tests, scores)
