"""Saving where a run stands, and going on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import distributed

from spectralx.averaging import AverageWeights
from spectralx.callbacks import KeepCheckpoints
from spectralx.lightning_modules import Stage
from spectralx.logs import mark_logs
from spectralx.resume import RunState, save_frozen, save_state
from spectralx.stopping import StopSignal
from spectralx.training_state import (
    collect_frozen,
    collect_model,
    collect_optimizer,
    collect_randomness,
    collect_schedule,
    processes,
    restore_optimizer,
    restore_randomness,
    restore_schedule,
)


class KeepState(pl.Callback):
    """Save the state of a run every few steps, at its end, and when it is asked to stop.

    A state is what holds between two steps, after the validation and the logs of the step before.
    The model's weights are restored before, by whoever builds it.

    Parameters
    ----------
    folder : of the run.
    every : steps between two states.
    about : what else goes into each state, as JSON holds it.
    keep, average : whose values belong to the state; `average` comes later among the callbacks.
    stop : says when the run shall stop.
    resumed : the state to go on from, or None.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        about: dict[str, Any],
        keep: KeepCheckpoints,
        average: AverageWeights | None,
        stop: StopSignal,
        resumed: RunState | None,
    ) -> None:
        self.folder = folder
        self.every = every
        self.about = about
        self.keep = keep
        self.average = average
        self.stop = stop
        self.resumed = resumed
        self._saved_at = 0 if resumed is None else resumed.step
        self._frozen: str | None = None if resumed is None else resumed.values["frozen"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Stage)
        if self.resumed is None:
            return
        tensors, values = self.resumed.tensors, self.resumed.values
        restore_optimizer(trainer.optimizers[0], tensors, values["groups"])
        restore_schedule(trainer, values)
        if pl_module.plateau is not None:
            pl_module.plateau.load_state_dict(values["plateau"])
        prefix = "stage/"
        extra = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        pl_module.restore_extra_state(extra)
        if self.average is not None:
            self.average.restore(pl_module.model, tensors)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.listen()
        self.stop.patient = True
        if self.resumed is not None:
            restore_randomness(self.resumed.tensors)
            self.resumed = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches:
            return
        stop = self._stop_agreed(pl_module.device)
        if step > self._saved_at and (stop or step % self.every == 0):
            self.save(trainer, pl_module)
        if stop:
            if step > 0:
                self.keep.write_last(trainer, pl_module)
            self.stop.obey(f" at step {step}; the same command goes on from there")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, pl_module)
        self.stop.patient = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stop.patient = False

    def _stop_agreed(self, device: torch.device) -> bool:
        """Whether any process has been asked to stop."""
        received = self.stop.received
        if processes() == 1:
            return received is not None
        number = torch.tensor(0 if received is None else int(received), device=device)
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        self.stop.receive(int(number))
        return int(number) > 0

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the state between two steps; all processes take part, one writes."""
        assert isinstance(module, Stage)
        optimizer, groups = collect_optimizer(trainer.optimizers[0])
        tensors = collect_model(module.model) | optimizer | collect_randomness(module.device)
        tensors |= {f"stage/{name}": value for name, value in module.extra_state().items()}
        if self.average is not None:
            tensors |= self.average.collect()
        frozen = collect_frozen(module.model) if self._frozen is None else {}
        step = self._saved_at = trainer.global_step
        if not trainer.is_global_zero:
            self._frozen = ""
            return
        folder = self.folder / "resume"
        if self._frozen is None:
            self._frozen = save_frozen(folder, frozen)
        values = {
            **self.about,
            **collect_schedule(trainer),
            "groups": groups,
            "plateau": None if module.plateau is None else module.plateau.state_dict(),
            "keep": self.keep.values(),
            "frozen": self._frozen,
            "logs": mark_logs(self.folder, trainer.loggers),
        }
        save_state(folder, RunState(step, tensors, values))
