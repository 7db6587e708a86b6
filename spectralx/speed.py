"""How fast a run is, and what it waits for."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch

from spectralx.logs import SPEED_PREFIX

# ru_maxrss counts kibibytes, on macOS bytes.
_RSS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far: of tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_PER_MIB


class Speed(pl.Callback):
    """Logs images a second over all processes, the share of time waiting for data, and memory.

    Measured between two logged steps, validations and saving left out. Place it first, so that the
    work of other callbacks is not taken for waiting.

    Parameters
    ----------
    images_per_batch : over all processes.
    every : steps between two figures.
    """

    def __init__(self, images_per_batch: int, every: int) -> None:
        self.images_per_batch = images_per_batch
        self.every = every
        self._ended: float | None = None  # when the batch before did; None where that says nothing
        self._began = 0.0
        self._reset()

    def _reset(self) -> None:
        self._waiting = self._working = 0.0
        self._batches = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        if self._ended is not None:
            self._waiting += time.perf_counter() - self._ended

    def work_begins(self) -> None:
        """The batch is there, and all callbacks have run."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        self._ended = time.perf_counter()
        self._working += self._ended - self._began
        self._batches += 1
        if trainer.fit_loop._should_accumulate() or trainer.global_step % self.every:
            return
        seconds = self._waiting + self._working
        figures = {
            "images_per_second": self._batches * self.images_per_batch / seconds,
            "data_wait_share": self._waiting / seconds,
            "peak_memory_mib": peak_memory_mib(pl_module.device),
        }
        for name, value in figures.items():
            pl_module.log(f"{SPEED_PREFIX}{name}", value)
        self._reset()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = None
