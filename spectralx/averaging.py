"""A moving average of the weights, which validation, checkpoints and tests then see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from spectralx.training_state import copy_into, whole


class AverageWeights(pl.Callback):
    """After each step the average moves by ``1 - decay`` towards the trained weights.

    Running statistics of batch norms are the trained model's. Place it after what keeps
    checkpoints: they are then written while the average is in the model.

    Parameters
    ----------
    decay : between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}  # while the average is in the model
        self._step = 0

    @staticmethod
    def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if not self.average:
            assert isinstance(pl_module.model, nn.Module)
            self.average = {
                name: p.detach().clone() for name, p in self._parameters(pl_module.model).items()
            }

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *unused: Any
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        assert isinstance(pl_module.model, nn.Module)
        for name, parameter in self._parameters(pl_module.model).items():
            self.average[name].lerp_(parameter.detach(), 1 - self.decay)

    @torch.no_grad()
    def _enter(self, model: nn.Module) -> None:
        for name, parameter in self._parameters(model).items():
            self._trained[name] = parameter.detach().clone()
            parameter.copy_(self.average[name])

    @torch.no_grad()
    def _leave(self, model: nn.Module) -> None:
        for name, parameter in self._parameters(model).items():
            parameter.copy_(self._trained.pop(name))

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The average is in `model`; where it is already, it stays."""
        if self._trained or not self.average:
            yield
            return
        self._enter(model)
        try:
            yield
        finally:
            self._leave(model)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            assert isinstance(pl_module.model, nn.Module)
            self._enter(pl_module.model)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._trained:
            assert isinstance(pl_module.model, nn.Module)
            self._leave(pl_module.model)

    def collect(self) -> dict[str, Tensor]:
        """Copies of the average, as a saved state holds them."""
        return {
            f"average/{name}": whole(tensor).detach().to("cpu", copy=True)
            for name, tensor in self.average.items()
        }

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `collect` collected."""
        self.average = {}
        for name, parameter in self._parameters(model).items():
            self.average[name] = parameter.detach().clone()
            copy_into(self.average[name], tensors[f"average/{name}"])
