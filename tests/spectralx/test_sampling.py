from __future__ import annotations

import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from spectralx.data import Sample
from spectralx.datamodule import TaskData
from spectralx.sampling import Augmented, Shared, TrainingOrder, derive_seed, end_with_parent
from tests.spectralx.tiny import tiny_settings


def _order(**options: Any) -> list[list[tuple[int, int]]]:
    return list(TrainingOrder(7, **{"batch_size": 3, "batches": 6, "seed": 1, **options}))


def test_all_images_come_before_any_comes_again() -> None:
    indices = [index for batch in _order(batches=14) for _, index in batch]
    turns = [indices[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    assert [place for batch in _order() for place, _ in batch] == list(range(18))


def test_the_order_is_the_seeds() -> None:
    assert _order() == _order()
    assert _order() != _order(seed=2)


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_run_goes_on_where_it_was(start: int) -> None:
    assert _order(start=start, batches=6 - start) == _order()[start:]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(processes: int) -> None:
    parts = [
        _order(rank=rank, processes=processes, batches=6 // processes) for rank in range(processes)
    ]
    assert [batch for together in zip(*parts, strict=True) for batch in together] == _order()


@pytest.mark.parametrize(("length", "processes"), [(7, 2), (6, 3), (1, 1), (4, 2)])
def test_validation_images_are_shared_out_once(length: int, processes: int) -> None:
    shares = [Shared(length, batch_size=2, rank=r, processes=processes) for r in range(processes)]
    counts = Counter(index for share in shares for batch in share for _, index in batch)
    assert counts == dict.fromkeys(range(length), 1)
    assert [len(list(share)) for share in shares] == [len(share) for share in shares]
    assert next(iter(shares[0])) == [(index, index) for index in range(min(2, length))]


def test_seeds_differ_by_purpose_and_place() -> None:
    seeds = {
        derive_seed(seed, purpose, *place)
        for seed in (0, 1)
        for purpose in ("order", "augmentation", "model")
        for place in ((0, 0), (0, 1), (1, 0), (2**40, 3))
    }
    assert len(seeds) == 24
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "model", 5) == derive_seed(0, "model", 5)


def test_a_data_loading_process_does_not_outlive_the_one_that_started_it() -> None:
    end_with_parent(0)  # this one was started by none, or by one that lives
    context = multiprocessing.get_context("fork")
    process = context.Process(target=end_with_parent, args=(0,))
    process.start()
    process.join()
    assert process.exitcode == 0
    orphan = context.Process(target=_orphaned)
    orphan.start()
    orphan.join()
    assert orphan.exitcode == 1


def _orphaned() -> None:
    multiprocessing.process._parent_process = _Gone()  # type: ignore[attr-defined]
    end_with_parent(0)


class _Gone:
    def is_alive(self) -> bool:
        return False


class _Noise(Dataset[Sample]):
    def __getitem__(self, index: int) -> Sample:
        return {"image": torch.rand(2) + index, "mask": torch.zeros(1), "path": ""}


def test_augmentation_follows_from_the_position_and_leaves_other_randomness_alone() -> None:
    dataset = Augmented(_Noise(), seed=3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = dataset[(5, 1)]["image"]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(dataset[(5, 1)]["image"], first)
    assert not torch.equal(dataset[(12, 1)]["image"], first)
    assert not torch.equal(Augmented(_Noise(), seed=4)[(5, 1)]["image"], first)


def test_batches_do_not_depend_on_workers_or_interruption(
    tiny_scenes: Path, tmp_path: Path
) -> None:
    def batches(workers: int, first: int) -> list[torch.Tensor]:
        settings = tiny_settings(
            tiny_scenes, tmp_path, f"--data.workers={workers}", "--stage1.run.steps=3"
        )
        data = TaskData(settings.data, settings.stage1.run, seed=7)
        data.first_step = first
        before = torch.get_rng_state()
        found = [batch["image"] for batch in data.train_dataloader()]
        assert torch.equal(torch.get_rng_state(), before)
        return found

    whole = batches(0, 0)
    assert len(whole) == 3
    assert all(map(torch.equal, batches(2, 0), whole))
    assert all(map(torch.equal, batches(0, 1), whole[1:]))


def test_going_on_reads_nothing_that_was_seen(tiny_scenes: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_scenes, tmp_path, "--data.cache=false")
    data = TaskData(settings.data, settings.stage1.run)
    read = []
    plain = type(data.task.train).read_pixels

    class Counting(type(data.task.train)):  # type: ignore[misc]
        def read_pixels(self, index: int) -> Any:
            read.append(index)
            return plain(self, index)

    data.task.train.__class__ = Counting
    data.first_step = 3
    assert len(list(data.train_dataloader())) == 1
    assert len(read) == settings.stage1.run.batch_size
