"""Leaving out tiles that cannot be read: only where that is asked for, counted and named.

Which files those are is known before a first sample is drawn, from reading all of them once, so the
order of samples follows from the files that are left and from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from spectralx.cli import one_line, refresh_seconds

from .errors import UnreadableError, data_error
from .samples import ImageDataset
from .tiles import TileDataset

Skipped = Mapping[str, Mapping[str, str]]
"""Set ("train", ...) -> file that cannot be read -> what is wrong with it, in one line."""


class SkipDamaged:
    """Leaves the files that cannot be read out of a dataset: ``skip("train", dataset)``.

    A file counts as one that cannot be read where it is cut, damaged or no GeoTIFF, declares more
    than `spectralx.data.raster.LARGEST_READ`, or differs from its checksum. Its image, or its
    labels' image, is left out with all its windows. Files that can be read and do not fit (other
    bands, unknown labels) stay errors.

    Parameters
    ----------
    known : what an earlier call found. Nothing is read then, and a file that was damaged since is
        an error where it is met.
    workers : processes that read; 0 reads here. What is found does not depend on it.
    progress : show a progress bar on stderr.

    Attributes
    ----------
    skipped : what was left out so far.
    """

    def __init__(
        self, known: Skipped | None = None, *, workers: int = 0, progress: bool = False
    ) -> None:
        self.known = known
        self.workers = workers
        self.progress = progress
        self.skipped: dict[str, dict[str, str]] = {}

    def __call__(self, name: str, dataset: ImageDataset) -> ImageDataset:
        """`dataset` without the files that cannot be read.

        Parameters
        ----------
        name : of the set, for `skipped`.

        Raises
        ------
        DataError : a dataset without files of its own, or one that keeps none.
        """
        if not isinstance(dataset, TileDataset):
            raise data_error(
                "data.skip_damaged", f"true for a dataset without files, {dataset.name}", "false"
            )
        files = self._unreadable(dataset) if self.known is None else dict(self.known.get(name, {}))
        self.skipped[name] = files
        left = [
            pair
            for pair in dataset.pairs
            if str(pair.image) not in files and str(pair.label) not in files
        ]
        if not left:
            first = next(iter(files.values()))
            raise data_error(dataset.name, f"no image that can be read ({first})", "at least one")
        return dataset.subset(left, name=dataset.name)

    def _unreadable(self, dataset: TileDataset) -> dict[str, str]:
        loader = DataLoader(
            _Tried(dataset),
            batch_size=None,
            num_workers=self.workers,
            # Its own, so that looking leaves the randomness of training alone.
            generator=torch.Generator(),
        )
        bar = tqdm(
            loader,
            desc=f"looking for damage in {dataset.name}",
            unit="image",
            disable=not self.progress,
            mininterval=refresh_seconds(),
        )
        found: dict[str, str] = {}
        for outcome in bar:
            if outcome is not None:
                found.setdefault(*outcome)
        return found


class _Tried(Dataset[tuple[str, str] | None]):
    """For each sample the file of it that cannot be read, and why; None for a whole one."""

    def __init__(self, dataset: TileDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        try:
            self.dataset.read(index)
        except UnreadableError as error:
            return str(error.path), one_line(error)
        return None


def counts(skipped: Skipped) -> dict[str, int]:
    """Files left out of each set."""
    return {name: len(files) for name, files in skipped.items()}
