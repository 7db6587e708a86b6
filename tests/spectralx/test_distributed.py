"""Two processes over gloo on a CPU: the losses of one process, one writer, and going on."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from spectralx import checkpoints
from spectralx.cli import InputError
from spectralx.data import TileDataset, build_task
from spectralx.data.scenes import write_scenes
from spectralx.logs import METRICS
from spectralx.machine import join_processes, shard, trainer_options
from spectralx.pictures import Curve, read_curves
from spectralx.run_settings import TrainerSettings
from tests.harden import runs

BATCHES = "--{stage}.run.accumulate=2"  # of one process: what two have together
LONG = pytest.mark.skipif("SPECTRALX_LONG" not in os.environ, reason="SPECTRALX_LONG=1 runs it too")
STEADY = "--{stage}.optimizer.schedule=constant"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with validation images for two processes."""
    root = tmp_path_factory.mktemp("scenes") / "whu-ohs"
    return write_scenes("whu-ohs", root, size=32, count=30, progress=False)


def _curves(folder: Path, stage: str) -> dict[str, Curve]:
    return read_curves(folder / "run" / stage / METRICS)


def _alone(
    stage: str, scenes: Path, folder: Path, options: tuple[str, ...] = (STEADY,)
) -> dict[str, Curve]:
    case = runs.Case(stage, 0, scenes, options=(BATCHES, *options))
    assert runs.finish(case, folder) == 0, (folder / "output.txt").read_text()
    return _curves(folder, stage)


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [
        ("stage2", "ddp"),
        ("stage1", "fsdp2"),
        pytest.param("stage1", "ddp", marks=LONG),
    ],
)
def test_two_processes_have_the_losses_of_one_and_go_on(
    scenes: Path, tmp_path: Path, stage: str, strategy: str
) -> None:
    one = _alone(stage, scenes, tmp_path / "one")
    together = tmp_path / "two"
    case = runs.Case(stage, 0, scenes, options=(STEADY, f"--trainer.strategy={strategy}"))
    output = together / "output.txt"
    assert runs.finish_together(case, together, 2) == [0, 0], output.read_text()
    two = _curves(together, stage)
    assert two["train/loss"][0] == one["train/loss"][0] == list(range(8))
    assert two["train/loss"][1] == pytest.approx(one["train/loss"][1], rel=1e-4)
    # Before training, figures over all validation images are those of one process; later the
    # running statistics of batch norms are of half as many batches.
    for name in one:
        if name.startswith("val/"):
            assert two[name][0] == one[name][0]
            assert two[name][1][0] == pytest.approx(one[name][1][0], rel=1e-5)
    for name in ("best", "last"):
        tensors = checkpoints.load(together / "run" / stage / name).tensors
        expected = checkpoints.load(tmp_path / "one" / "run" / stage / name).tensors
        assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in expected.items()}
    # One wrote: each figure is there once, and each line was printed once.
    logged = [tag for tag, *_ in runs.scalars(together / "run" / stage) if tag != "epoch"]
    assert len(logged) == sum(len(steps) for steps, _ in two.values())
    assert output.read_text().count("parameters train") == 1

    killed = tmp_path / "killed"
    group = runs.start_together(case, killed, 2)
    states = killed / "run" / stage / "resume"
    until = time.monotonic() + runs.LONGEST
    while not list(states.glob("step-000000004-*")) and time.monotonic() < until:
        time.sleep(0.005)
    for process in group:
        process.kill()
        process.join()
    assert runs.finish_together(case, killed, 2) == [0, 0], (killed / "output.txt").read_text()
    assert "going on at step" in (killed / "output.txt").read_text()
    expected = runs.outcome(together / "run" / stage)
    assert runs.differences(expected, runs.outcome(killed / "run" / stage)) == []


def test_a_loss_that_is_not_finite_in_one_process_stops_both(scenes: Path, tmp_path: Path) -> None:
    case = runs.Case("stage2", 0, scenes, options=("--stage2.optimizer.lr=1e30", STEADY))
    assert runs.finish_together(case, tmp_path, 2) == [1, 1]
    text = (tmp_path / "output.txt").read_text()
    assert text.count("spectralx.train: error: loss: found") == 2
    assert str(scenes) in text


SKIPPED = ("--data.skip_damaged=true", "--data.cache=false", "--stage2.run.steps=2", STEADY)


def _damaged(scenes: Path, folder: Path, count: int | None) -> tuple[Path, list[Path]]:
    """A copy of `scenes` with so many training images cut, or all; those."""
    copy = Path(shutil.copytree(scenes, folder / "scenes"))
    train = build_task("WS-WD", copy).train
    assert isinstance(train, TileDataset)
    cut = [pair.image for pair in train.pairs[:count]]
    for path in cut:
        path.write_bytes(path.read_bytes()[:1000])
    return copy, cut


def test_two_processes_go_without_the_same_damaged_files(scenes: Path, tmp_path: Path) -> None:
    copy, cut = _damaged(scenes, tmp_path, 3)
    one = _alone("stage2", copy, tmp_path / "one", SKIPPED)
    case = runs.Case("stage2", 0, copy, options=SKIPPED)
    output = tmp_path / "two" / "output.txt"
    assert runs.finish_together(case, tmp_path / "two", 2) == [0, 0], output.read_text()
    two = _curves(tmp_path / "two", "stage2")
    assert two["train/loss"][0] == one["train/loss"][0] == list(range(2))
    assert two["train/loss"][1] == pytest.approx(one["train/loss"][1], rel=1e-4)
    text = output.read_text()
    assert [text.count(f"left out of train: {path}") for path in cut] == [1, 1, 1]


def test_two_processes_end_alike_where_no_file_can_be_read(scenes: Path, tmp_path: Path) -> None:
    copy, cut = _damaged(scenes, tmp_path, None)
    case = runs.Case("stage2", 0, copy, options=SKIPPED)
    assert runs.finish_together(case, tmp_path, 2) == [2, 2]
    lines = (tmp_path / "output.txt").read_text().splitlines()
    assert len(lines) == 2
    assert all(str(cut[0]) in line for line in lines)


def test_a_single_number_is_not_sharded() -> None:
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.tensor(0.01))
    with pytest.raises(InputError, match="fsdp2, which does not take scale"):
        shard(model, mesh=None)


def test_devices_without_their_processes_are_refused() -> None:
    with pytest.raises(InputError, match="torchrun --nproc-per-node 2"):
        join_processes(TrainerSettings(devices=2))
    alone = join_processes(TrainerSettings())
    assert (alone.rank, alone.count) == (0, 1)
    with pytest.raises(InputError, match=r"trainer\.strategy: found fsdp2 with one process"):
        trainer_options(TrainerSettings(accelerator="cpu", strategy="fsdp2"), alone)
    assert not torch.distributed.is_initialized()
