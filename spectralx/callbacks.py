"""What Lightning calls during a run: checkpoints in our format and a quiet progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from spectralx.averaging import AverageWeights
from spectralx.cli import one_line, refresh_seconds
from spectralx.resume import SaveError
from spectralx.training_state import whole_state_dict

# (folder, model, its state dict, what is worth noting about it)
SaveModel = Callable[[Path, nn.Module, Mapping[str, Tensor], dict[str, Any]], object]


class KeepCheckpoints(pl.Callback):
    """Write ``last`` at every validation and ``best`` whenever `monitor` improves.

    Parameters
    ----------
    folder : of the run; holds ``best`` and ``last``.
    save : writes a model, with what is worth noting about it, to a folder in one step.
    monitor, mode : the logged quantity that decides, and "min" or "max".
    patience : validations in a row without a better one after which training stops; None never.
    average : weights that are kept in place of the trained ones, or None.

    Attributes
    ----------
    best_score : of the best checkpoint; None before the first.
    since_best : validations since then.
    figures : of the latest validation.
    """

    def __init__(
        self,
        folder: Path,
        save: SaveModel,
        monitor: str,
        mode: str,
        *,
        patience: int | None = None,
        average: AverageWeights | None = None,
    ) -> None:
        self.folder = folder
        self.save = save
        self.monitor = monitor
        self.sign = 1.0 if mode == "max" else -1.0
        self.patience = patience
        self.average = average
        self.best_score: float | None = None
        self.since_best = 0
        self.figures: dict[str, float] = {}
        self._written_at = -1

    @property
    def best(self) -> Path:
        """Folder of the best checkpoint."""
        return self.folder / "best"

    @property
    def last(self) -> Path:
        """Folder of the last checkpoint."""
        return self.folder / "last"

    @property
    def stopped(self) -> bool:
        """Whether there is no more patience."""
        return self.patience is not None and self.since_best >= self.patience

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule, *folders: Path) -> None:
        """All processes take part, one writes."""
        model = module.model
        assert isinstance(model, nn.Module)
        with nullcontext() if self.average is None else self.average.in_place(model):
            tensors = whole_state_dict(model)
            if not trainer.is_global_zero:
                return
            # Only a validation of these weights speaks of them.
            figures = self.figures if trainer.validating else {}
            scores = {f"val/{k}": v for k, v in figures.items() if math.isfinite(v)}
            for folder in folders:
                try:
                    self.save(
                        folder, model, tensors, {"step": trainer.global_step, "scores": scores}
                    )
                except (OSError, SafetensorError) as error:
                    raise SaveError(
                        f"{folder}: could not be saved: {one_line(error)}; what was saved before "
                        "is whole"
                    ) from error

    def write_last(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Bring ``last`` up to date, unless it is."""
        if self._written_at != trainer.global_step:
            self._write(trainer, module, self.last)
            self._written_at = trainer.global_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.figures = validation_figures(trainer.callback_metrics)
        # Weights before the first step are validated too, but not worth keeping.
        if trainer.state.fn != TrainerFn.FITTING:
            return
        score = float(trainer.callback_metrics[self.monitor])
        better = self.best_score is None or self.sign * (score - self.best_score) > 0
        better = better and math.isfinite(score)
        self._write(trainer, pl_module, self.last, *([self.best] if better else []))
        self._written_at = trainer.global_step
        self.best_score = score if better else self.best_score
        self.since_best = 0 if better else self.since_best + 1
        if self.stopped:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write_last(trainer, pl_module)

    def values(self) -> dict[str, Any]:
        """What a saved state holds of this."""
        return {
            "best_score": self.best_score,
            "since_best": self.since_best,
            "figures": self.figures,
            "written_at": self._written_at,
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Put back what `values` gave."""
        self.best_score = values["best_score"]
        self.since_best = values["since_best"]
        self.figures = dict(values["figures"])
        self._written_at = values["written_at"]


def validation_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a validation by name, without their ``val/``."""
    return {
        name.removeprefix("val/"): float(value)
        for name, value in metrics.items()
        if name.startswith("val/")
    }


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
                total=self.steps,
                initial=trainer.global_step,
                desc=self.name,
                unit="step",
                mininterval=refresh_seconds(),
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
