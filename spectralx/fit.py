"""Train one stage of an experiment."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from spectralx import checkpoints, pictures
from spectralx.averaging import AverageWeights
from spectralx.beginning import Stage, describe, stage_data, stage_module
from spectralx.build import start_identity
from spectralx.callbacks import KeepCheckpoints, Progress, SaveModel
from spectralx.cli import write_text
from spectralx.data.damage import counts
from spectralx.datamodule import TaskData, describe_normalisation
from spectralx.evaluate import Evaluation, run_tests
from spectralx.finished import FINISHED, Finished, FitResult, read_finished, write_finished
from spectralx.keep_state import KeepState
from spectralx.lightning_modules import ReconstructionStage, SegmentationStage
from spectralx.logs import METRICS, SPEED, check_wandb, close_logs, open_logs, take_back
from spectralx.machine import (
    Processes,
    check_machine,
    join_processes,
    meet,
    prepare_model,
    trainer_options,
)
from spectralx.reconstruction import MaskedReconstruction
from spectralx.resume import RunState, check_unchanged, load_frozen, load_state
from spectralx.segmentation import Segmentation
from spectralx.settings import Settings, Stage1Settings, Stage2Settings
from spectralx.speed import Speed
from spectralx.stopping import StopSignal
from spectralx.training_state import place_trainer, restore_model

__all__ = ["FitResult", "Stage", "fit"]

# Settings that change no figure of a run: an interrupted one may go on with others.
_FREE = {
    "data": ("workers", "cache", "cache_folder"),
    "trainer": ("progress", "wandb"),
    "run": ("save_every", "pictures"),
}
# What a stage writes into its folder; removed in this order, what speaks of the rest first.
_WRITTEN_FILES = (FINISHED, "test.json", METRICS, SPEED, "wandb-run")
_WRITTEN = ("resume", "best", "last", "tensorboard", "pictures")


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
            # Nothing is done in place to what the model returns.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _about(stage: Stage, settings: Settings, processes: int) -> dict[str, Any]:
    """What a run must have in common with the one it goes on from."""
    values = settings.as_dict()
    own = values[stage]
    for part, names in ((values["data"], "data"), (values["trainer"], "trainer")):
        for name in _FREE[names]:
            part.pop(name, None)
    for name in _FREE["run"]:
        own["run"].pop(name)
    kept = {key: values[key] for key in ("data", "model", "trainer", "seed", stage)}
    return {**kept, "processes": processes, "start": start_identity(stage, settings)}


def _clear(folder: Path) -> None:
    """Remove what an earlier run of the stage wrote."""
    for name in _WRITTEN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _WRITTEN:
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def _sweep(folder: Path) -> None:
    """Remove what a crash left half written."""
    for path in folder.glob("*/.writing-*"):
        shutil.rmtree(path)
    for path in [*folder.glob(".*.partial"), *folder.glob("*/.partial")]:
        path.unlink()


def _trainer(
    settings: Settings,
    own: Stage1Settings | Stage2Settings,
    folder: Path,
    group: Processes,
    loggers: list[Logger],
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    run = own.run
    return pl.Trainer(
        # No gradient reaches the Are-adapter's queries and keys.
        **trainer_options(settings.trainer, group, unused=isinstance(own, Stage2Settings)),
        max_steps=run.steps,
        max_epochs=-1,
        accumulate_grad_batches=run.accumulate,
        # Counted in batches across epochs; the last validation sees the last step.
        val_check_interval=min(run.validate_every, run.steps) * run.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=own.optimizer.clip,
        log_every_n_steps=settings.trainer.log_every,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        deterministic=False,
        inference_mode=False,  # sums of the validation before training go on in later ones
        use_distributed_sampler=False,  # `spectralx.sampling` shares the images out
    )


def fit(stage: Stage, settings: Settings, *, fresh: bool = False) -> FitResult:
    """Train one stage; the best checkpoint on the source's validation images is then tested.

    Writes below ``settings.out/<stage>``: ``best`` and ``last`` (see `spectralx.checkpoints`),
    ``settings.yaml``, ``metrics.csv``, ``speed.csv``, ``tensorboard``, ``test.json``,
    ``finished.json``, ``pictures``, and in ``resume`` where the run stands. Nothing is written
    before data, model and start checkpoint have been found to fit together.

    A run that was interrupted goes on from its latest state, to the same weights and figures, bit
    for bit, on the same machine with as many threads; one that is finished is not run again, and
    goes on where `settings` have more steps than it had.

    Parameters
    ----------
    stage : "stage1" or "stage2".
    settings : of the experiment.
    fresh : forget what an earlier run left in the folder.

    Raises
    ------
    ValueError : data, settings or checkpoints that cannot be used, or other settings than those
        an interrupted run began with; in one line.
    NonFiniteLossError : a loss that is not finite; the checkpoints are those before it.
    SaveError : a file that could not be written; what was saved before is whole.
    StopRequested : stopped by SIGTERM; its state is saved.
    KeyboardInterrupt : interrupted; its state is saved, ``last`` holds the weights at that moment.
    """
    check_machine(settings.trainer)
    check_wandb(settings.trainer.wandb)
    group = join_processes(settings.trainer)
    with StopSignal() as stop:
        return _Run(stage, settings, group, stop).fit(fresh)


class _Run:
    """One call of `fit`."""

    def __init__(
        self, stage: Stage, settings: Settings, group: Processes, stop: StopSignal
    ) -> None:
        self.stage: Stage = stage
        self.settings = settings
        self.group = group
        self.stop = stop
        self.own = settings.stage1 if stage == "stage1" else settings.stage2
        self.folder = Path(settings.out) / stage
        self.about = _about(stage, settings, group.count)

    def say(self, line: str) -> None:
        """Print a line, in one process."""
        if self.group.rank == 0:
            print(line, flush=True)

    def check_same(self, began: dict[str, Any]) -> None:
        """An earlier run in the folder began as this one would."""
        check_unchanged(self.folder, began, self.about, f"{self.stage}.run.steps")

    def fit(self, fresh: bool) -> FitResult:
        """See the function `fit`."""
        settings, folder, steps = self.settings, self.folder, self.own.run.steps
        if fresh and self.group.rank == 0:
            _clear(folder)
        meet(self.group)
        finished = read_finished(folder)
        if finished is not None:
            self.check_same(finished.about)
            if finished.stopped or finished.step == steps:
                self.say(
                    f"{self.stage}: finished before, {finished.step} steps, in {folder} "
                    "(--fresh trains again)"
                )
                return finished.result
        if settings.trainer.threads is not None:
            torch.set_num_threads(settings.trainer.threads)
        pl.seed_everything(settings.seed, workers=False, verbose=False)
        state = load_state(self.folder / "resume", self.say)
        if state is not None:
            self.check_same(state.values["about"])
        data = stage_data(self.stage, settings, self.group, state, self.say)
        module = stage_module(self.stage, settings, data, self.say)
        if state is not None:
            self.restore(module, state)
        data.check()
        self.say(describe(self.stage, data, module.model))
        if self.group.rank == 0:
            self.prepare_folder(state)
        meet(self.group)
        return self.train(data, module, state)

    def restore(self, module: ReconstructionStage | SegmentationStage, state: RunState) -> None:
        """Put the weights of `state` into the model."""
        where = self.folder / "resume"
        frozen = load_frozen(where, state.values["frozen"])
        restore_model(module.model, {**state.tensors, **frozen}, str(where))

    def prepare_folder(self, state: RunState | None) -> None:
        """What is in the folder is what was there at `state`."""
        if state is None:
            _clear(self.folder)
        else:
            take_back(self.folder, state.values["logs"])
            (self.folder / FINISHED).unlink(missing_ok=True)
            self.say(
                f"{self.stage}: going on at step {state.step} of {self.own.run.steps}, "
                f"in {self.folder}"
            )
        _sweep(self.folder)
        write_text(self.folder / "settings.yaml", yaml.safe_dump(self.settings.as_dict()))

    def train(
        self,
        data: TaskData,
        module: ReconstructionStage | SegmentationStage,
        state: RunState | None,
    ) -> FitResult:
        """Run the steps that are left, and the tests."""
        settings, own, folder = self.settings, self.own, self.folder
        step = data.first_step = 0 if state is None else state.step
        prepare_model(module.model, settings.trainer)
        average = None if own.optimizer.ema is None else AverageWeights(own.optimizer.ema)
        keep = KeepCheckpoints(
            folder,
            self.saver(data),
            module.monitor,
            module.mode,
            patience=own.run.early_stopping,
            average=average,
        )
        about: dict[str, Any] = {
            "about": self.about,
            "images": data.images_digest(),
            "skipped": data.task.skipped,
        }
        if state is not None:
            keep.restore(state.values["keep"])
            about["before"] = state.values["before"]
        speed = Speed(own.run.batch_size * self.group.count, settings.trainer.log_every)
        module.work_begins = speed.work_begins
        keep_state = KeepState(folder, own.run.save_every, about, keep, average, self.stop, state)
        callbacks: list[pl.Callback] = [speed, keep, keep_state]
        if average is not None:
            callbacks.append(average)
        if settings.trainer.progress:
            callbacks.append(Progress(folder.name, own.run.steps, ("train/loss", keep.monitor)))
        with _quiet_lightning():
            logs = open_logs(folder, module.logged, settings.trainer.wandb, settings.as_dict())
            trainer = _trainer(settings, own, folder, self.group, logs, callbacks)
            try:
                if state is None:
                    trainer.validate(module, datamodule=data, verbose=False)
                    about["before"] = keep.figures
                if step < own.run.steps and not keep.stopped:
                    place_trainer(trainer, step)
                    trainer.fit(module, datamodule=data)
            except SystemExit as error:
                # Lightning's way of passing on an interruption.
                raise KeyboardInterrupt(str(error.__context__ or "")) from error
            except (ConnectionError, EOFError) as error:
                # torch says so itself, unless the connection breaks before the process ends.
                if not settings.data.workers:
                    raise
                raise RuntimeError(
                    "DataLoader worker ended while it handed a batch over "
                    f"({type(error).__name__}: {error})"
                ) from error
            finally:
                close_logs(logs)
        if self.stop.received is not None:
            self.stop.obey(" after the last step; the same command goes on from there")
        result = FitResult(
            folder,
            keep.best,
            keep.last,
            about["before"],
            keep.figures,
            None,
            data.task.skipped,
        )
        if self.group.rank == 0:
            result.evaluation = self.test(data, keep, trainer.strategy.root_device)
            done = trainer.global_step if step < own.run.steps else step
            write_finished(Finished(result, done, keep.stopped, self.about))
        meet(self.group)
        return result

    def saver(self, data: TaskData) -> SaveModel:
        """What writes a checkpoint of the stage."""
        about: dict[str, Any] = {
            "stage": self.stage,
            "settings": self.settings.as_dict(),
            "tile_size": list(data.tile_size()),
        }
        if data.task.skipped:
            about["skipped"] = counts(data.task.skipped)

        def save(
            folder: Path, model: nn.Module, tensors: Mapping[str, Tensor], noted: dict[str, Any]
        ) -> None:
            checkpoints.save(
                folder,
                model,
                wavelengths=list(data.task.wavelengths),
                class_names=list(data.task.class_names),
                normalisation=describe_normalisation(data.task.train),
                extra={**about, **noted},
                tensors=tensors,
            )

        return save

    def test(self, data: TaskData, keep: KeepCheckpoints, device: torch.device) -> Evaluation:
        """Test the best checkpoint and draw the pictures."""
        model = checkpoints.load(keep.best).build().to(device)
        assert isinstance(model, (MaskedReconstruction, Segmentation))
        shown = self.folder / "pictures"
        pictures.learning_curves(shown / "curves.png", pictures.read_curves(self.folder / METRICS))
        evaluation = run_tests(
            model,
            data,
            official=self.settings.data.official,
            pictures_to=shown,
            count=self.own.run.pictures,
        )
        write_text(self.folder / "test.json", json.dumps(evaluation.tests, indent=2) + "\n")
        return evaluation
