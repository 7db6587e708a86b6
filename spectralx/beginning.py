"""What a stage begins with: its images, and its model as it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import nn

from spectralx.build import initialise, reconstruction_model, segmentation_model
from spectralx.cli import InputError
from spectralx.data.damage import SkipDamaged, Skipped, counts
from spectralx.datamodule import TaskData
from spectralx.lightning_modules import ReconstructionStage, SegmentationStage
from spectralx.machine import Processes, share
from spectralx.reconstruction import MaskedReconstruction
from spectralx.resume import RunState
from spectralx.segmentation import Segmentation
from spectralx.settings import Settings

Stage = Literal["stage1", "stage2"]


def stage_data(
    stage: Stage,
    settings: Settings,
    group: Processes,
    state: RunState | None,
    say: Callable[[str], None],
) -> TaskData:
    """The images of a stage, without damaged files where that is asked for.

    Parameters
    ----------
    group : one of these processes looks for damage, so that all go without the same.
    state : of the run that goes on, without the files that it went without, or None.
    say : gets a line for each file that is left out.

    Raises
    ------
    InputError : other images than the run began with.
    """

    def made(known: Skipped | None) -> TaskData:
        progress = settings.trainer.progress and group.rank == 0
        skip = SkipDamaged(known, workers=settings.data.workers, progress=progress)
        own = getattr(settings, stage)
        return TaskData(settings.data, own.run, seed=settings.seed, skip=skip)

    data: TaskData | None = None
    known: Skipped | None = None if state is None else state.values["skipped"]
    if settings.data.skip_damaged:

        def looked() -> Skipped:
            nonlocal data
            data = made(known)
            return data.task.skipped

        known = share(group, looked)
    if data is None:
        data = made(known)
    if state is not None and state.values["images"] != data.images_digest():
        raise InputError(
            f"{Path(settings.out) / stage}: found other images of training and validation than the "
            "run began with; expected the same files (--fresh starts again)"
        )
    for name, files in data.task.skipped.items():
        for error in files.values():
            say(f"{stage}: left out of {name}: {error}")
    return data


def stage_module(
    stage: Stage, settings: Settings, data: TaskData, say: Callable[[str], None]
) -> ReconstructionStage | SegmentationStage:
    """The stage's model as it starts, ready for Lightning."""
    task = data.task
    if stage == "stage1":
        first = reconstruction_model(settings, task.wavelengths)
        _start(first, settings, say)
        run = settings.stage1.run
        return ReconstructionStage(first, settings.stage1.optimizer, run.steps, seed=settings.seed)
    own = settings.stage2
    second = segmentation_model(settings, task.wavelengths, task.num_classes)
    _start(second, settings, say)
    return SegmentationStage(
        second,
        own.optimizer,
        own.run.steps,
        class_names=list(task.class_names),
        class_weights=data.class_weights() if own.class_weights == "balanced" else None,
        label_smoothing=own.label_smoothing,
        cutmix=own.cutmix,
        official=settings.data.official,
        seed=settings.seed,
    )


def _start(
    model: MaskedReconstruction | Segmentation, settings: Settings, say: Callable[[str], None]
) -> None:
    start = initialise(model, settings)
    if start is not None:
        say(str(start))
    elif settings.model.trainable == "adapters":
        say(
            "note: the backbone is frozen at a random start; model.backbone_weights names a file "
            "of public weights, model.trainable all trains everything"
        )


def describe(stage: Stage, data: TaskData, model: nn.Module) -> str:
    """What is trained on what, in one line."""
    left_out = counts(data.task.skipped)
    named = {"train": "training", "validation": "validation"}
    sizes = [
        f"{len(dataset)} {named[key]}"
        + (f" ({left_out[key]} damaged files left out)" if left_out.get(key) else "")
        for key, dataset in (("train", data.task.train), ("validation", data.task.validation))
    ]
    sizes += [f"{len(dataset)} test ({name})" for name, dataset in data.tests.items()]
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"{stage}: task {data.task.name}, {data.task.bands} bands, images: {', '.join(sizes)}; "
        f"{trained:,} of {total:,} parameters train"
    )
