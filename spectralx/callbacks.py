"""What Lightning calls during a run: checkpoints in our format and a quiet progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from tqdm import tqdm

from spectralx.cli import refresh_seconds

SaveModel = Callable[[Path, nn.Module, dict[str, Any]], object]


class KeepCheckpoints(pl.Callback):
    """Write ``last`` at every validation and ``best`` whenever `monitor` improves.

    Parameters
    ----------
    folder : of the run; holds ``best`` and ``last``.
    save : writes a model, with what is worth noting about it, to a folder in one step.
    monitor, mode : the logged quantity that decides, and "min" or "max".

    Attributes
    ----------
    best_score : of the best checkpoint; None before the first.
    """

    def __init__(self, folder: Path, save: SaveModel, monitor: str, mode: str) -> None:
        self.folder = folder
        self.save = save
        self.monitor = monitor
        self.sign = 1.0 if mode == "max" else -1.0
        self.best_score: float | None = None

    @property
    def best(self) -> Path:
        """Folder of the best checkpoint."""
        return self.folder / "best"

    @property
    def last(self) -> Path:
        """Folder of the last checkpoint."""
        return self.folder / "last"

    def _write(self, folder: Path, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        noted = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/") and math.isfinite(float(value))
        }
        model = module.model
        assert isinstance(model, nn.Module)
        self.save(folder, model, {"step": trainer.global_step, "scores": noted})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Weights before the first step are validated too, but not worth keeping.
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        self._write(self.last, trainer, pl_module)
        score = float(trainer.callback_metrics[self.monitor])
        better = self.best_score is None or self.sign * (score - self.best_score) > 0
        if better and math.isfinite(score):
            self._write(self.best, trainer, pl_module)
            self.best_score = score

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step > 0:
            self._write(self.last, trainer, pl_module)


class Progress(pl.Callback):
    """A progress bar over the steps of a run, on stderr; now and then where that is no terminal.

    Parameters
    ----------
    name : shown before the bar.
    steps : of the run.
    shown : logged quantities shown after the bar.
    """

    def __init__(self, name: str, steps: int, shown: Sequence[str]) -> None:
        self.name = name
        self.steps = steps
        self.shown = tuple(shown)
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=self.steps, desc=self.name, unit="step", mininterval=refresh_seconds()
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        if self.bar is not None:
            metrics = trainer.callback_metrics
            values = {key: f"{float(metrics[key]):.4g}" for key in self.shown if key in metrics}
            self.bar.set_postfix(values, refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
