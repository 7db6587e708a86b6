"""Train one stage of an experiment."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from spectralx import checkpoints, pictures
from spectralx.build import initialise, reconstruction_model, segmentation_model
from spectralx.callbacks import KeepCheckpoints, Progress
from spectralx.cli import write_text
from spectralx.datamodule import TaskData, describe_normalisation
from spectralx.evaluate import Evaluation, run_tests
from spectralx.lightning_modules import ReconstructionStage, SegmentationStage
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation
from spectralx.settings import RunSettings, Settings

Stage = Literal["stage1", "stage2"]


@dataclass
class FitResult:
    """What a stage left behind.

    Attributes
    ----------
    folder : of the stage: checkpoints, logs, pictures.
    best, last : folders of the two checkpoints.
    before, after : validation figures before the first and after the last step, by name.
    evaluation : the best checkpoint on the test sets; None on all processes but the first.
    """

    folder: Path
    best: Path
    last: Path
    before: dict[str, float]
    after: dict[str, float]
    evaluation: Evaluation | None


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's advice on hardware, workers and log folders."""
    loggers = [logging.getLogger(f"lightning.pytorch{end}") for end in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", module=r"torchmetrics\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _validation_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("val/"): float(value)
        for name, value in metrics.items()
        if name.startswith("val/")
    }


def _module(
    stage: Stage, settings: Settings, data: TaskData
) -> ReconstructionStage | SegmentationStage:
    """The stage's model as it starts, ready for Lightning."""
    task = data.task
    if stage == "stage1":
        first = reconstruction_model(settings, task.wavelengths)
        _start(first, settings)
        return ReconstructionStage(first, settings.stage1.optimizer, settings.stage1.run.steps)
    own = settings.stage2
    second = segmentation_model(settings, task.wavelengths, task.num_classes)
    _start(second, settings)
    return SegmentationStage(
        second,
        own.optimizer,
        own.run.steps,
        class_names=list(task.class_names),
        class_weights=data.class_weights() if own.class_weights == "balanced" else None,
        label_smoothing=own.label_smoothing,
        official=settings.data.official,
    )


def _start(model: MaskedReconstruction | Segmentation, settings: Settings) -> None:
    start = initialise(model, settings)
    if start is not None:
        print(start)
    elif settings.model.trainable == "adapters":
        print(
            "note: the backbone is frozen at a random start; model.backbone_weights names a file "
            "of public weights, model.trainable all trains everything"
        )


def _describe(stage: Stage, data: TaskData, model: nn.Module) -> str:
    sizes = [f"{len(data.task.train)} training", f"{len(data.task.validation)} validation"]
    sizes += [f"{len(dataset)} test ({name})" for name, dataset in data.tests.items()]
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"{stage}: task {data.task.name}, {data.task.bands} bands, images: {', '.join(sizes)}; "
        f"{trained:,} of {total:,} parameters train"
    )


def _trainer(
    settings: Settings, run: RunSettings, clip: float | None, folder: Path, keep: KeepCheckpoints
) -> pl.Trainer:
    machine = settings.trainer
    callbacks: list[pl.Callback] = [keep]
    if machine.progress:
        callbacks.append(Progress(folder.name, run.steps, ("train/loss", keep.monitor)))
    return pl.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        precision=machine.precision,
        max_steps=run.steps,
        max_epochs=-1,
        # Counted in batches across epochs; the last validation sees the last step.
        val_check_interval=min(run.validate_every, run.steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=clip,
        log_every_n_steps=machine.log_every,
        callbacks=callbacks,
        logger=[
            CSVLogger(folder.parent, name=folder.name, version=""),
            TensorBoardLogger(folder, name="tensorboard"),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        deterministic=False,
        use_distributed_sampler=True,
    )


def fit(stage: Stage, settings: Settings) -> FitResult:
    """Train one stage; the best checkpoint on the source's validation images is then tested.

    Writes below ``settings.out/<stage>``: ``best`` and ``last`` (see `spectralx.checkpoints`),
    ``settings.yaml``, ``metrics.csv``, ``tensorboard``, ``test.json`` and ``pictures``. Nothing is
    written before data, model and start checkpoint have been found to fit together.

    Parameters
    ----------
    stage : "stage1" or "stage2".
    settings : of the experiment.

    Raises
    ------
    ValueError : data, settings or checkpoints that cannot be used, in one line.
    NonFiniteLossError : a loss that is not finite; the checkpoints are those before it.
    KeyboardInterrupt : interrupted; ``last`` holds the weights at that moment.
    """
    if settings.trainer.threads is not None:
        torch.set_num_threads(settings.trainer.threads)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    own = settings.stage1 if stage == "stage1" else settings.stage2
    data = TaskData(settings.data, own.run)
    module = _module(stage, settings, data)
    data.check()
    print(_describe(stage, data, module.model))

    def save(folder: Path, model: nn.Module, noted: dict[str, Any]) -> None:
        checkpoints.save(
            folder,
            model,
            wavelengths=list(data.task.wavelengths),
            class_names=list(data.task.class_names),
            normalisation=describe_normalisation(data.task.train),
            extra={"stage": stage, "settings": settings.as_dict(), **noted},
        )

    folder = Path(settings.out) / stage
    keep = KeepCheckpoints(folder, save, module.monitor, module.mode)
    with _quiet_lightning():
        trainer = _trainer(settings, own.run, own.optimizer.clip, folder, keep)
        if trainer.is_global_zero:
            write_text(folder / "settings.yaml", yaml.safe_dump(settings.as_dict()))
        trainer.validate(module, datamodule=data, verbose=False)
        before = _validation_figures(trainer.callback_metrics)
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit as error:
            raise KeyboardInterrupt(f"interrupted; {keep.last} holds the last weights") from error
        after = _validation_figures(trainer.callback_metrics)
    evaluation = None
    if trainer.is_global_zero:
        module.to(trainer.strategy.root_device)
        evaluation = _test(module, data, own.run, keep)
    return FitResult(folder, keep.best, keep.last, before, after, evaluation)


def _test(
    module: ReconstructionStage | SegmentationStage,
    data: TaskData,
    run: RunSettings,
    keep: KeepCheckpoints,
) -> Evaluation:
    """Test the best checkpoint and draw the pictures."""
    folder = keep.folder
    checkpoints.load(keep.best).load_into(module.model)
    official = isinstance(module, SegmentationStage) and module.official
    shown = folder / "pictures"
    pictures.learning_curves(shown / "curves.png", pictures.read_curves(folder / "metrics.csv"))
    evaluation = run_tests(
        module.model, data, official=official, pictures_to=shown, count=run.pictures
    )
    write_text(folder / "test.json", json.dumps(evaluation.tests, indent=2) + "\n")
    return evaluation
