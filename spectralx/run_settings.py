"""Settings of a stage's run: its length, its optimiser, and the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spectralx.cli import InputError


def require(condition: bool, key: str, found: object, expected: str) -> None:
    """Refuse the value `found` of setting `key`, in one line, unless `condition` holds."""
    if not condition:
        raise InputError(f"{key}: found {found}; expected {expected}")


@dataclass
class OptimizerSettings:
    """AdamW and its learning rate.

    Parameters
    ----------
    lr
        Learning rate.
    betas
        Decay of the two moments.
    weight_decay
        Decoupled weight decay.
    schedule
        "constant", "cosine" (down to 0 over the run) or "plateau" (a tenth whenever the
        validation loss has not fallen for more than `patience` validations).
    warmup
        Steps of linear warm-up, for constant and cosine.
    patience
        See schedule.
    clip
        Largest norm of the gradient; null does not clip.
    ema
        Decay a step of a moving average of the weights, e.g. 0.999, which is then what is
        validated, kept and tested; null has none.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    warmup: int = 0
    patience: int = 5
    clip: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        require(
            self.schedule != "plateau" or self.warmup == 0,
            "optimizer.warmup",
            self.warmup,
            "0 with the plateau schedule",
        )
        require(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "more than 0")
        require(self.ema is None or 0 < self.ema < 1, "optimizer.ema", self.ema, "between 0 and 1")


@dataclass
class RunSettings:
    """How long a stage trains, and on how much at a time.

    Parameters
    ----------
    steps
        Optimiser steps.
    batch_size
        Images that a device holds at once.
    accumulate
        Batches whose gradients make one step.
    validate_every
        Steps between validations.
    save_every
        Steps between two states that an interrupted run goes on from.
    early_stopping
        Stop after so many validations in a row, on the source domain, that bettered nothing;
        null never.
    pictures
        Images drawn after training; 0 draws none.
    """

    steps: int = 10_000
    batch_size: int = 32
    accumulate: int = 1
    validate_every: int = 500
    save_every: int = 100
    early_stopping: int | None = None
    pictures: int = 3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "validate_every", "save_every"):
            value = getattr(self, name)
            require(value >= 1, f"run.{name}", value, "at least 1")
        patience = self.early_stopping
        require(patience is None or patience >= 1, "run.early_stopping", patience, "at least 1")


@dataclass
class TrainerSettings:
    """The machine.

    Parameters
    ----------
    accelerator
        "auto", "cpu" or "gpu".
    devices
        Devices of this machine, one process each: "auto" takes as many as torchrun started
        processes here, and one without torchrun.
    strategy
        How several processes share the work: "ddp" has the whole model in each, "fsdp2" a part.
    precision
        As Lightning names it: 32-true, bf16-mixed, 16-mixed.
    compile
        Backend that torch.compile runs the model with, e.g. inductor; null does not compile.
    cuda_graphs
        Capture the compiled model's steps as CUDA graphs.
    gradient_checkpointing
        Compute each transformer block again in the backward pass instead of keeping it: less
        memory, more time, the same numbers.
    threads
        CPU threads; null leaves torch's own choice (OMP_NUM_THREADS).
    log_every
        Steps between logged training losses.
    wandb
        Project of Weights & Biases to log to as well; null logs to files alone.
    progress
        Show a progress bar.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = "auto"
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    compile: str | None = None
    cuda_graphs: bool = False
    gradient_checkpointing: bool = False
    threads: int | None = None
    log_every: int = 10
    wandb: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        require(self.log_every >= 1, "trainer.log_every", self.log_every, "at least 1")
