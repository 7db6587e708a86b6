"""The two stages as Lightning modules: steps, validation, optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torchmetrics import MeanMetric

from spectralx.datamodule import Batch
from spectralx.machine import shard
from spectralx.metrics import SegmentationScores
from spectralx.mixing import cutmix
from spectralx.reconstruction import MaskedReconstruction, Reconstruction
from spectralx.sampling import derive_seed
from spectralx.segmentation import Segmentation
from spectralx.settings import OptimizerSettings
from spectralx.training_state import processes
from spectralx_kernels import (
    masked_patch_loss,
    upsample_argmax,
    upsample_cross_entropy,
    upsample_cross_entropy_argmax,
)

PLATEAU_FACTOR = 0.1


class NonFiniteLossError(ArithmeticError):
    """A loss that is NaN or infinite: names the files of its batch."""


def learning_rate_factor(step: int, settings: OptimizerSettings, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) over ``settings.lr``."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule != "cosine":
        return 1.0
    done = (step - settings.warmup) / max(total_steps - settings.warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def fixed_mask_noise(batch_index: int, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Mask noise of a validation batch: the same at every validation, so that losses compare."""
    generator = torch.Generator().manual_seed(batch_index)
    return torch.rand(shape, generator=generator).to(like)


def separate_masks(mask: Tensor | list[Tensor]) -> list[Tensor]:
    """The masks of a batch: [B, H, W] alone, or B of [1, H, W] where their sizes differ."""
    return [mask] if isinstance(mask, Tensor) else [one[None] for one in mask]


def _separate_logits(logits: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """`logits` [B, K, h, w] as `separate_masks` separated the masks."""
    return list(logits.split([len(mask) for mask in masks]))


def predict_masks(logits: Tensor, mask: Tensor | list[Tensor]) -> list[Tensor]:
    """Classes int64 at the size of the masks of a batch, separated as `separate_masks` does.

    Parameters
    ----------
    logits : [B, K, h, w].
    mask : [B, H, W], or B masks of different sizes.
    """
    masks = separate_masks(mask)
    predictions = []
    for part, one in zip(_separate_logits(logits, masks), masks, strict=True):
        prediction = upsample_argmax(part, list(one.shape[-2:]))
        assert isinstance(prediction, Tensor)
        predictions.append(prediction)
    return predictions


def masked_error(model: MaskedReconstruction, result: Reconstruction, images: Tensor) -> Tensor:
    """Mean squared error of the predicted patches that were masked: comparable across families."""
    return masked_patch_loss(result.prediction, images, result.mask, model.patch_size)


class Stage(pl.LightningModule):
    """What both stages share.

    Subclasses set `monitor` and `mode`, which choose the best, `logged`, all that they log, and
    `averaged`, the means over validation images among it.
    """

    monitor: str
    mode: str
    logged: tuple[str, ...]
    averaged: tuple[str, ...]
    model: nn.Module
    means: Mapping[str, MeanMetric]

    def __init__(self, optimizer: OptimizerSettings, total_steps: int, seed: int) -> None:
        super().__init__()
        self.optimizer_settings = optimizer
        self.total_steps = total_steps
        self.seed = seed
        self.plateau: ReduceLROnPlateau | None = None
        self.work_begins: Callable[[], None] | None = None
        self._losses: list[Tensor] = []  # of the batches of this step
        # Not Lightning's means, which over processes count the images in whole numbers.
        self.means = nn.ModuleDict({name: MeanMetric() for name in self.averaged})  # type: ignore[assignment]

    def configure_model(self) -> None:
        # Lightning has a mesh of devices for FSDP2 alone; a second call must not shard again.
        mesh = self.device_mesh
        if mesh is not None and not any(isinstance(p, DTensor) for p in self.model.parameters()):
            shard(self.model, mesh["data_parallel"])

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Noise follows from the batch's number alone, so interruptions and the number of
        # processes do not matter. `ready` counts this batch already.
        trainer = self.trainer
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        place = number * trainer.world_size + trainer.global_rank
        torch.manual_seed(derive_seed(self.seed, "model", place))
        if self.work_begins is not None:
            self.work_begins()

    def configure_optimizers(self) -> Any:
        settings = self.optimizer_settings
        optimizer = AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        if settings.schedule == "plateau":
            self.plateau = ReduceLROnPlateau(
                optimizer, factor=PLATEAU_FACTOR, patience=settings.patience
            )
            return optimizer
        schedule = LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, settings, self.total_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_validation_start(self) -> None:
        # All processes score the model that one of them keeps.
        if processes() > 1:
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, src=0)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.log("lr", optimizer.param_groups[0]["lr"])

    def on_validation_epoch_end(self) -> None:
        means = {name: mean.compute() for name, mean in self.means.items()}
        for name, value in means.items():
            self.log(f"val/{name}", value)
            self.means[name].reset()
        if self.plateau is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.plateau.step(means["loss"])

    def log_training_loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """Log the mean of `loss` over the batches of a step and over all processes.

        Raises
        ------
        NonFiniteLossError : before the weights are changed, on every process.
        """
        mean = loss.detach().to(torch.float32, copy=True)
        if self.trainer.world_size > 1:
            distributed.all_reduce(mean)
            mean = mean / self.trainer.world_size
        if not torch.isfinite(mean):
            self._refuse(loss.detach(), batch)
        self._losses.append(mean)
        if not self.trainer.fit_loop._should_accumulate():
            self.log("train/loss", torch.stack(self._losses).mean(), batch_size=1)
            self._losses.clear()
        return loss

    def _refuse(self, loss: Tensor, batch: Batch) -> None:
        if torch.isfinite(loss):
            raise NonFiniteLossError(
                f"loss: found one that is not finite in another process at step "
                f"{self.global_step}; expected a finite number (that process names the images)"
            )
        raise NonFiniteLossError(
            f"loss: found {loss.item()} at step {self.global_step}; expected a finite number; "
            f"images of the batch: {', '.join(batch['path'])}"
        )

    def extra_state(self) -> dict[str, Tensor]:
        """What a validation hands on to the next, by name; all processes together."""
        return {}

    def restore_extra_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `extra_state` gave."""

    def log_validation(self, name: str, value: Tensor | float, size: int) -> None:
        """Log the mean over validation and all processes of `value`, weighted by `size` images."""
        self.means[name].update(value, size)


class ReconstructionStage(Stage):
    """Stage 1: masked reconstruction."""

    monitor = "val/loss"
    mode = "min"
    logged = ("lr", "train/loss", "val/loss", "val/masked_loss")
    averaged = ("loss", "masked_loss")
    model: MaskedReconstruction

    def __init__(
        self,
        model: MaskedReconstruction,
        optimizer: OptimizerSettings,
        total_steps: int,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, total_steps, seed)
        self.model = model

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        result = self.model(batch["image"])
        return self.log_training_loss(result.loss, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = batch["image"]
        trainer = self.trainer
        # The batch's number among those of all processes (`spectralx.sampling.Shared`).
        number = batch_idx * trainer.world_size + trainer.global_rank
        noise = fixed_mask_noise(number, (len(images), self.model.patches), images)
        result = self.model(images, noise)
        self.log_validation("loss", result.loss, len(images))
        self.log_validation("masked_loss", masked_error(self.model, result, images), len(images))


class SegmentationStage(Stage):
    """Stage 2: semantic segmentation.

    Parameters
    ----------
    model : a `Segmentation`.
    optimizer, total_steps, seed : of the run.
    class_names : index 0 first, the unlabelled class.
    class_weights : float [K] or None.
    label_smoothing : of the training loss.
    cutmix : probability of a training image to be given a part of another of its batch.
    official : score as the published protocol does.
    """

    monitor = "val/miou"
    mode = "max"
    logged = (
        "lr",
        "train/loss",
        "val/f1",
        "val/kappa",
        "val/loss",
        "val/miou",
        "val/overall_accuracy",
    )
    averaged = ("loss",)
    model: Segmentation
    class_weights: Tensor | None

    def __init__(
        self,
        model: Segmentation,
        optimizer: OptimizerSettings,
        total_steps: int,
        *,
        class_names: list[str],
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        cutmix: float = 0.0,
        official: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, total_steps, seed)
        self.model = model
        self.label_smoothing = label_smoothing
        self.cutmix = cutmix
        self.official = official
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.scores = SegmentationScores(
            class_names, protocol="official" if official else "proper", sync_on_compute=True
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, mask = batch["image"], batch["mask"]
        assert isinstance(mask, Tensor)  # training images are resized with their masks
        if self.cutmix > 0:
            images, mask = cutmix(images, mask, self.cutmix)
        logits = self.model(images)
        loss = upsample_cross_entropy(
            logits,
            mask,
            weight=self.class_weights,
            ignore_index=0,
            label_smoothing=self.label_smoothing,
        )
        return self.log_training_loss(loss, batch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, masks = self.model(batch["image"]), separate_masks(batch["mask"])
        for part, truth in zip(_separate_logits(logits, masks), masks, strict=True):
            found = upsample_cross_entropy_argmax(part, truth, ignore_index=0)
            self.scores.update(found.label, truth)
            self.log_validation("loss", found.loss, len(part))

    def extra_state(self) -> dict[str, Tensor]:
        matrix = self.scores.matrix.clone()
        if processes() > 1:
            distributed.all_reduce(matrix)
        return {"scores": matrix}

    def restore_extra_state(self, tensors: Mapping[str, Tensor]) -> None:
        # Scores are summed over processes: one of them holds all that was counted before.
        first = self.trainer.is_global_zero
        matrix = tensors["scores"] if first else torch.zeros_like(tensors["scores"])
        self.scores.matrix = matrix.to(self.scores.matrix.device)

    def on_validation_epoch_end(self) -> None:
        scores = self.scores.compute()
        for name, value in scores.summary().items():
            # An empty truth has no score; 0 lets any later one be better.
            self.log(f"val/{name}", 0.0 if math.isnan(value) else value)
        if not self.official:
            self.scores.reset()
        super().on_validation_epoch_end()
