"""A task's datasets as Lightning takes them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from spectralx.cli import InputError
from spectralx.data import (
    FixedStatistics,
    ImageDataset,
    Sample,
    Task,
    TileDataset,
    Whitened,
    build_task,
    collate,
    finish,
)
from spectralx.data.cache import DiskCache, MemoryCache
from spectralx.data.damage import SkipDamaged
from spectralx.data.normalise import AnyNormalisation, describe
from spectralx.data.normalise import restore_normalisation as restore_normalisation
from spectralx.data.samples import Batch as Batch
from spectralx.sampling import Augmented, Key, Shared, TrainingOrder, end_with_parent
from spectralx.settings import DataSettings, RunSettings

# Image files up to this size together are all read before training starts.
READ_ALL_BYTES = 2**29
# What Lightning reads, and passes through `TaskData.on_after_batch_transfer`.
_TRAINER_READS = ("train", "validation")


def describe_normalisation(dataset: ImageDataset) -> dict[str, Any]:
    """The scaling of `dataset` as a checkpoint keeps it; `restore_normalisation` reads it."""
    scaling = dataset.normalisation
    assert isinstance(scaling, AnyNormalisation)
    return describe(scaling)


class TaskData(pl.LightningDataModule):
    """Training on, validation on and tests of one task.

    An epoch is the whole training: images are drawn in random order, all of them before any comes
    again, until `run.steps` steps are full.

    Parameters
    ----------
    settings : of the data.
    run : batch size and number of steps.
    normalisation : scaling of a model that is trained already, instead of the settings'.
    seed : of the order of training images and of their augmentation.
    skip : leaves damaged files out of training and validation, where the settings ask for that; by
        default all files are read to find them.

    Attributes
    ----------
    first_step : the step that training begins with; set it before the training loader is made.
    task : the datasets.
    tests : name -> dataset; "source" first, then "target", or "target ..." for each of several.

    Raises
    ------
    ValueError : data that is missing or does not fit together, in one line.
    """

    def __init__(
        self,
        settings: DataSettings,
        run: RunSettings,
        *,
        normalisation: AnyNormalisation | None = None,
        seed: int = 0,
        skip: SkipDamaged | None = None,
    ) -> None:
        super().__init__()
        if settings.skip_damaged and skip is None:
            skip = SkipDamaged(workers=settings.workers)
        self.run = run
        self.seed = seed
        self.first_step = 0
        self.workers = settings.workers
        self.task = build_task(
            settings.task,
            settings.root,
            image_size=settings.image_size,
            crop=settings.crop,
            flips=settings.flips,
            turns=settings.turns,
            spectral_jitter=settings.spectral_jitter,
            normalisation="image" if normalisation is not None else settings.normalisation,
            label_offset=settings.label_offset,
            official=settings.official,
            wavelengths=settings.wavelengths,
            class_names=settings.class_names,
            nodata=settings.nodata,
            skip=skip if settings.skip_damaged else None,
        )
        self._given = normalisation
        self._settings = settings
        self._prepared: dict[str, ImageDataset] = {}
        self.tests: dict[str, ImageDataset] = {"source": self.task.source_test}
        targets = self.task.target_tests
        for name, dataset in targets.items():
            self.tests["target" if len(targets) == 1 else f"target {name}"] = dataset

    def _dataset(self, key: str, dataset: ImageDataset) -> ImageDataset:
        if key not in self._prepared:
            self._prepared[key] = self._prepare(key, dataset)
        return self._prepared[key]

    def _prepare(self, key: str, dataset: ImageDataset) -> ImageDataset:
        """`dataset` as it is read: scaled as given, cached, raw where the device scales it."""
        settings = self._settings
        if self._given is not None:
            dataset = dataset.with_normalisation(self._given)
        if settings.cache:
            dataset = dataset.with_cache(MemoryCache())
            for index in range(len(dataset)):
                dataset.read(index)
        elif settings.cache_folder is not None:
            if not isinstance(dataset, TileDataset):
                raise ValueError(
                    f"data.cache_folder: found a dataset without files, {dataset.name}; expected "
                    "null for it"
                )
            dataset = dataset.with_cache(DiskCache(settings.cache_folder, dataset))
        on_device = settings.scale_on == "device" or (
            settings.scale_on == "auto" and torch.cuda.is_available()
        )
        # Tests are read by loops of their own, which take images as they come.
        return dataset.with_raw_samples() if on_device and key in _TRAINER_READS else dataset

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Scale and resize on the device what the datasets left as stored."""
        size, scaling = self._settings.image_size, self._given or self.task.train.normalisation
        mixing = None
        if isinstance(scaling, Whitened) and "low" in batch:
            mixing = torch.from_numpy(scaling.mixing).to(batch["low"].device)
        return finish(
            batch, size=(size, size), clipped=isinstance(scaling, FixedStatistics), mixing=mixing
        )

    def _loader(self, dataset: Dataset[Sample], batches: Sampler[list[Key]]) -> DataLoader[Sample]:
        return DataLoader(
            Augmented(dataset, self.seed),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=end_with_parent,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own, so that reading leaves the randomness of training alone.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _process(self) -> tuple[int, int]:
        """The number of this process, and of all that train."""
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches of random, augmented images: those of step `first_step` to the last."""
        run, (rank, processes) = self.run, self._process()
        order = TrainingOrder(
            len(self.task.train),
            batch_size=run.batch_size,
            batches=(run.steps - self.first_step) * run.accumulate,
            start=self.first_step * run.accumulate,
            seed=self.seed,
            rank=rank,
            processes=processes,
        )
        return self._loader(self._dataset("train", self.task.train), order)

    def val_dataloader(self) -> DataLoader[Sample]:
        """The validation images, in order; each process gets other batches of them."""
        dataset, (rank, processes) = self.task.validation, self._process()
        size = self.run.batch_size
        if len(dataset) <= size * (processes - 1):
            raise InputError(
                f"run.batch_size: found {size} for {len(dataset)} validation images; expected "
                f"at least one batch for each of {processes} processes"
            )
        batches = Shared(len(dataset), batch_size=size, rank=rank, processes=processes)
        return self._loader(self._dataset("validation", dataset), batches)

    def test_loader(self, name: str) -> DataLoader[Sample]:
        """The test images of ``tests[name]``, in order."""
        dataset = self.tests[name]
        batches = Shared(len(dataset), batch_size=self.run.batch_size)
        return self._loader(self._dataset(f"test {name}", dataset), batches)

    def images_digest(self) -> str:
        """SHA-256 of the names, in order, of the images of training and validation."""
        digest = hashlib.sha256()
        for dataset in (self.task.train, self.task.validation):
            names = [dataset.path_of(index) for index in range(len(dataset))]
            digest.update(json.dumps(names).encode())
        return digest.hexdigest()

    def tile_size(self) -> tuple[int, int]:
        """Height and width that an image of training covers, in pixels of the first file.

        Of parts that are cut out and resized, those of the whole, which is what validation sees.
        """
        side = self._settings.image_size
        if self._settings.crop == "crop":
            return side, side
        rows, columns = self.task.train.read_pixels(0)[0].shape[-2:]
        return rows, columns

    def check(self) -> None:
        """Read images and labels once, so that damage is found before anything is written.

        All of them where they are cached or small altogether, else the first of each set: what is
        wrong with the others then ends the run when they are met.
        """
        named = {"train": self.task.train, "validation": self.task.validation}
        named |= {f"test {name}": dataset for name, dataset in self.tests.items()}
        sizes = [dataset.file_bytes() for dataset in named.values()]
        small = sum(size or 0 for size in sizes) <= READ_ALL_BYTES and None not in sizes
        for key, dataset in named.items():
            samples = self._dataset(key, dataset)
            for index in range(len(dataset) if small else 1):
                samples[index]

    def class_weights(self) -> Tensor:
        """Inverse square root of each class's share of the labelled training pixels.

        Mean 1 over the classes that occur; the unlabelled class and classes that do not occur
        have 0. float32 [K].
        """
        return _class_weights(self.task)


def _class_weights(task: Task) -> Tensor:
    counts = torch.zeros(task.num_classes, dtype=torch.float64)
    for index in range(len(task.train)):
        classes = torch.from_numpy(task.train.read_classes(index)).reshape(-1)
        counts += torch.bincount(classes, minlength=task.num_classes)
    counts[0] = 0
    weights = torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0.0)
    return (weights * (counts > 0).sum().clamp(min=1) / weights.sum().clamp(min=1e-12)).float()
