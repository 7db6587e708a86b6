"""Which images a step sees and which randomness it meets, as functions of the seed and its number.

Nothing here depends on how many processes read, on how many train, or on where a run was
interrupted: a run that goes on from step n needs no more than n. A *batch* is what one process
passes through the model at once; batch ``n * processes + rank`` of the run is the n-th that process
`rank` sees, so one process that accumulates two batches a step and two processes of one batch each
train on the same.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from spectralx.data import Sample

_PURPOSES = {"order": 0, "augmentation": 1, "model": 2}

Key = tuple[int, int]


def end_with_parent(worker: int) -> None:
    """End this data-loading process if the one that started it has been killed meanwhile.

    From then on DataLoader watches over that; it does not notice what came before.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def derive_seed(
    seed: int, purpose: Literal["order", "augmentation", "model"], *numbers: int
) -> int:
    """A seed of 63 bits for one purpose of the run `seed`, at one place given by `numbers`."""
    words = np.random.SeedSequence([seed, _PURPOSES[purpose], *numbers])
    return int(words.generate_state(1, np.uint64)[0] >> np.uint64(1))


class TrainingOrder(Sampler[list[Key]]):
    """Batches of (position in the run, index of the image), all images before any comes again.

    Parameters
    ----------
    length : number of images.
    batch_size : images a batch.
    batches : how many, for this process.
    start : batches of this process that were seen before; they are not drawn again.
    seed : of the run.
    rank, processes : this process and their number.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        batches: int,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.batches = batches
        self.start = start
        self.seed = seed
        self.rank = rank
        self.processes = processes
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Key]]:
        for number in range(self.start, self.start + self.batches):
            first = (number * self.processes + self.rank) * self.batch_size
            yield [(place, self._index(place)) for place in range(first, first + self.batch_size)]

    def _index(self, place: int) -> int:
        turn, rest = divmod(place, self.length)
        if turn != self._shuffled[0]:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", turn))
            self._shuffled = turn, torch.randperm(self.length, generator=generator).tolist()
        return self._shuffled[1][rest]


class Augmented(Dataset[Sample]):
    """`dataset` by `Key`: its random transforms follow from the seed and the position alone."""

    def __init__(self, dataset: Dataset[Sample], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: Key) -> Sample:
        position, index = key
        source = torch.default_generator
        before = source.get_state()
        source.manual_seed(derive_seed(self.seed, "augmentation", position, index))
        try:
            return self.dataset[index]
        finally:
            source.set_state(before)


class Shared(Sampler[list[Key]]):
    """The batches of all images in order that fall to this process: one in `processes`.

    The position of an image is its index. None is seen twice, so figures over all processes are
    those of one process.
    """

    def __init__(self, length: int, *, batch_size: int, rank: int = 0, processes: int = 1) -> None:
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes

    def _starts(self) -> range:
        return range(self.rank * self.batch_size, self.length, self.processes * self.batch_size)

    def __len__(self) -> int:
        return len(self._starts())

    def __iter__(self) -> Iterator[list[Key]]:
        for start in self._starts():
            stop = min(start + self.batch_size, self.length)
            yield [(index, index) for index in range(start, stop)]
