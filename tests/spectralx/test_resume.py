"""Interrupted runs end as undisturbed ones do, bit for bit; `tests.harden kills` does more."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open

from spectralx import checkpoints
from spectralx.cli import STOP_STATUS, InputError
from spectralx.finished import FINISHED
from spectralx.fit import fit
from spectralx.lightning_modules import ReconstructionStage
from spectralx.logs import METRICS
from spectralx.resume import (
    RunState,
    SaveError,
    check_unchanged,
    load_frozen,
    load_state,
    save_frozen,
    save_state,
)
from spectralx.train import main
from tests.harden import faults, runs
from tests.spectralx.tiny import tiny_config, tiny_settings

# All that is random about data is on in stage 2: flips and turns by default, and an offset of each
# band of what whitening, measured anew by each process, gives.
OPTIONS = {
    "stage1": (),
    "stage2": ("--data.normalisation=whitened", "--data.spectral_jitter=0.1"),
}


def _case(stage: str, workers: int, scenes: Path, *options: str) -> runs.Case:
    return runs.Case(stage, workers, scenes, options=(*OPTIONS[stage], *options))


def _state(step: int) -> RunState:
    return RunState(step, {"a": torch.arange(step + 1.0)}, {"note": step})


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_state_comes_back_and_two_are_kept(tmp_path: Path) -> None:
    assert load_state(tmp_path / "resume") is None
    for step in (2, 4, 6):
        save_state(tmp_path, _state(step))
    assert [path.name[:14] for path in sorted(tmp_path.iterdir())] == [
        "step-000000004",
        "step-000000006",
    ]
    found = load_state(tmp_path)
    assert found is not None
    assert found.step == 6
    assert found.values == {"note": 6}
    assert torch.equal(found.tensors["a"], torch.arange(7.0))


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path) -> None:
    save_state(tmp_path, _state(2))
    last = save_state(tmp_path, _state(4))
    _damage(last)
    said: list[str] = []
    found = load_state(tmp_path, said.append)
    assert found is not None
    assert found.step == 2
    assert len(said) == 1
    assert last.name in said[0]
    assert "damaged; going on from the one before" in said[0]
    # One between them takes the damaged one's place.
    save_state(tmp_path, _state(3))
    assert not last.exists()
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="found 2 states, none of them whole"):
        load_state(tmp_path, said.append)


def test_files_of_another_format_are_not_taken(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from spectralx.checkpoints.reading import sha256_of

    save_file({"a": torch.ones(1)}, tmp_path / "new", metadata={"format": "other"})
    digest = sha256_of(tmp_path / "new")[:16]
    (tmp_path / "new").rename(tmp_path / f"step-000000001-{digest}.safetensors")
    said: list[str] = []
    with pytest.raises(InputError, match="none of them whole"):
        load_state(tmp_path, said.append)
    assert "found format other" in said[0]


def test_frozen_weights_are_kept_once(tmp_path: Path) -> None:
    name = save_frozen(tmp_path, {"w": torch.ones(2)})
    assert torch.equal(load_frozen(tmp_path, name)["w"], torch.ones(2))
    save_state(tmp_path, _state(1))
    _damage(tmp_path / name)
    with pytest.raises(InputError, match="damaged"):
        load_frozen(tmp_path, name)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match="no such file"):
        load_frozen(tmp_path, name)


def test_what_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    import resource

    old = save_state(tmp_path, _state(2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SaveError, match="what was saved before is whole"):
            save_state(tmp_path, RunState(4, {"a": torch.zeros(10_000)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [old]


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    began = {"model": {"depth": 4}, "stage1": {"run": {"steps": 4}}, "seed": 0}
    check_unchanged(tmp_path, began, began, "stage1.run.steps")
    more = {**began, "stage1": {"run": {"steps": 5}}}
    check_unchanged(tmp_path, began, more, "stage1.run.steps")
    with pytest.raises(InputError, match=r"stage1\.run\.steps: found 4; expected 5"):
        check_unchanged(tmp_path, more, began, "stage1.run.steps")
    with pytest.raises(InputError, match=r"model\.depth: found 8; expected 4.*seed: found 1"):
        check_unchanged(
            tmp_path, began, {**began, "model": {"depth": 8}, "seed": 1}, "stage1.run.steps"
        )


@pytest.fixture(scope="module")
def calm(
    tiny_scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[runs.Pace, dict[str, Any]]]:
    """Undisturbed runs of both stages: their pace and what they left."""
    found = {}
    for stage in ("stage1", "stage2"):
        folder = tmp_path_factory.mktemp(f"calm-{stage}")
        pace = runs.measure(_case(stage, 0, tiny_scenes), folder)
        found[stage] = pace, runs.outcome(folder / "run" / stage)
    return found


@pytest.mark.parametrize(
    ("stage", "workers", "kind", "seed"),
    [("stage1", 0, "saving", 1), ("stage2", 2, "time", 3)],
)
def test_killed_at_random(
    calm: dict[str, tuple[runs.Pace, dict[str, Any]]],
    tiny_scenes: Path,
    tmp_path: Path,
    stage: str,
    workers: int,
    kind: runs.Kind,
    seed: int,
) -> None:
    pace, expected = calm[stage]
    case = _case(stage, workers, tiny_scenes)
    draw = random.Random(seed)
    runs.kill(case, tmp_path, pace, kind, draw)
    run = tmp_path / "run" / stage
    assert runs.unloadable(run) == []
    assert runs.finish(case, tmp_path) == 0, (tmp_path / "output.txt").read_text()
    assert runs.differences(_any_workers(expected), _any_workers(runs.outcome(run))) == []


def _any_workers(outcome: dict[str, Any]) -> dict[str, Any]:
    """`outcome` without the number of data-loading processes, which may be another."""
    left = copy.deepcopy({k: v for k, v in outcome.items() if k != "settings.yaml"})
    for name in ("best", "last"):
        del left[f"{name} manifest"]["extra"]["settings"]["data"]["workers"]
    return left


def test_sigterm_saves_and_a_full_disk_leaves_the_old_state(
    calm: dict[str, tuple[runs.Pace, dict[str, Any]]], tiny_scenes: Path, tmp_path: Path
) -> None:
    pace, expected = calm["stage1"]
    case = _case("stage1", 0, tiny_scenes)
    draw = random.Random(0)
    process, connection = runs.start(case, tmp_path)
    connection.recv()
    runs.tell(process, signal.SIGTERM)
    process.join(runs.LONGEST)
    assert process.exitcode == STOP_STATUS
    text = (tmp_path / "output.txt").read_text()
    assert "stopped by SIGTERM at step" in text
    assert "Traceback" not in text
    assert faults.fill(case, tmp_path, pace, draw) == []
    assert runs.finish(case, tmp_path) == 0
    assert runs.differences(expected, runs.outcome(tmp_path / "run" / "stage1")) == []


def test_a_killed_data_loading_process_ends_the_run(
    calm: dict[str, tuple[runs.Pace, dict[str, Any]]], tiny_scenes: Path, tmp_path: Path
) -> None:
    pace, _ = calm["stage2"]
    case = _case("stage2", 2, tiny_scenes, "--stage2.run.steps=2000")
    assert faults.bereave(case, tmp_path, pace, random.Random(0)) == []
    assert "DataLoader worker" in (tmp_path / "output.txt").read_text()


def test_a_batch_that_is_cut_short_names_the_data_loading_process(
    tiny_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def cut(*_: Any, **__: Any) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(pl.Trainer, "fit", cut)
    given = [f"--config={tiny_config(tmp_path)}", f"--data.root={tiny_scenes}"]
    for workers, said in ((1, "DataLoader worker ended while"), (0, "ConnectionResetError: ")):
        out = f"--out={tmp_path / str(workers)}"
        assert main(["stage1", *given, out, f"--data.workers={workers}"]) == 1
        assert f"spectralx.train: error: {said}" in capsys.readouterr().err


def test_going_on_is_said_growing_is_allowed_and_all_else_refused(
    tiny_scenes: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = [
        "stage1",
        f"--config={tiny_config(tmp_path)}",
        f"--data.root={tiny_scenes}",
        f"--out={tmp_path / 'run'}",
        "--stage1.run.pictures=0",
    ]
    folder = tmp_path / "run" / "stage1"
    assert main(arguments) == 0
    first = capsys.readouterr().out
    rows = (folder / METRICS).read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    # Finished: nothing is written, the same report is printed.
    assert main([*arguments, "--data.workers=1"]) == 0
    again = capsys.readouterr().out
    assert "stage1: finished before, 4 steps" in again
    assert again.splitlines()[1:] == first.splitlines()[1:]
    assert kept == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    # Other settings.
    assert main([*arguments, "--stage1.optimizer.lr=0.1", "--seed=3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "seed: found 3; expected 0" in error
    assert "stage1.optimizer.lr: found 0.1; expected 0.001" in error
    assert main([*arguments, "--stage1.run.steps=3"]) == 2
    # More steps.
    assert main([*arguments, "--stage1.run.steps=6"]) == 0
    assert "stage1: going on at step 4 of 6" in capsys.readouterr().out
    assert (folder / METRICS).read_bytes().startswith(rows)
    assert checkpoints.load(folder / "last").manifest["extra"]["step"] == 6
    # All over again.
    assert main([*arguments, "--fresh"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert (folder / METRICS).read_bytes() == rows
    (folder / FINISHED).write_text("[]")
    assert main(arguments) == 2
    assert FINISHED in capsys.readouterr().err


def test_stage2_does_not_go_on_from_another_stage1(tiny_scenes: Path, tmp_path: Path) -> None:
    options = ("--stage1.run.pictures=0", "--stage2.run.pictures=0", "--stage2.run.steps=2")
    settings = tiny_settings(tiny_scenes, tmp_path, *options)
    fit("stage1", settings)
    fit("stage2", settings)
    settings.stage1.run.steps = 6
    settings.stage1.optimizer.lr = 1e-2
    fit("stage1", settings, fresh=True)
    with pytest.raises(InputError, match="start: found"):
        fit("stage2", settings)


def test_an_interruption_between_steps_saves_and_is_gone_on_from(
    tiny_scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    step = ReconstructionStage.training_step
    seen: list[int] = []

    def interrupted(self: ReconstructionStage, batch: Any, batch_idx: int) -> Any:
        seen.append(self.global_step)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ReconstructionStage, "training_step", interrupted)
    out = tmp_path / "run"
    arguments = ["stage1", f"--config={tiny_config(tmp_path)}", f"--data.root={tiny_scenes}"]
    assert main([*arguments, f"--out={out}"]) == 130
    assert "interrupted at step 3; the same command goes on" in capsys.readouterr().err
    assert checkpoints.load(out / "stage1" / "last").manifest["extra"]["step"] == 3
    assert checkpoints.load(out / "stage1" / "best").manifest["extra"]["step"] == 2
    state = next((out / "stage1" / "resume").glob("step-*"))
    with safe_open(state, framework="pt") as stored:
        assert json.loads(stored.metadata()["values"])["step"] == 3
    assert main([*arguments, f"--out={out}"]) == 0
    assert seen == [0, 1, 2, 3]
