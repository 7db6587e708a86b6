"""The runs of a comparison: every method with every seed, those that are finished left alone."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from spectralx import checkpoints
from spectralx.build import stage1_checkpoint
from spectralx.cli import InputError, write_text
from spectralx.comparison.methods import Method, method_settings
from spectralx.comparison.optical import optical_copy, optical_settings
from spectralx.comparison.work import SETTINGS, record_path
from spectralx.data import Task
from spectralx.datamodule import TaskData
from spectralx.differences import first_difference
from spectralx.fit import Stage
from spectralx.settings import FROM_STAGE1, Settings

PLAN = "comparison.json"
PRETRAINING = "pretraining"
_FREE = tuple(
    f"settings.{key}"
    for key in ("seed", "out", "data.workers", "trainer.progress", "trainer.log_every")
)


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes
    ----------
    method, seed : which.
    folder : of its settings, checkpoints, logs and records.
    """

    method: Method
    seed: int
    folder: Path


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes
    ----------
    settings : of the experiment; ``settings.out`` is the folder of the comparison.
    methods, seeds : each method is run with each seed.
    pretrain : steps of an optical backbone that all methods start from; 0 for none.
    """

    settings: Settings
    methods: Sequence[Method]
    seeds: Sequence[int]
    pretrain: int = 0

    @property
    def folder(self) -> Path:
        """Where everything is."""
        return Path(self.settings.out)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of a run: both where stage 2 starts from this experiment's stage 1."""
        both = self.settings.stage2.init_from == FROM_STAGE1
        return ("stage1", "stage2") if both else ("stage2",)

    @property
    def runs(self) -> list[Run]:
        """All runs: every method with the first seed, then with the next."""
        return [
            Run(method, seed, self.folder / "runs" / f"{method.name}-seed{seed}")
            for seed in self.seeds
            for method in self.methods
        ]

    def held(self) -> dict[str, Any]:
        """What is noted in the folder: but for `_FREE` it may not change between two calls."""
        return {"settings": self.settings.as_dict(), "pretrain": self.pretrain}


def finished(run: Run, stage: Stage) -> dict[str, Any] | None:
    """The record of a finished stage; None where it is not finished."""
    path = record_path(run.folder, stage)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _hold(plan: Plan) -> None:
    """Note the plan in its folder, or check that it is the one noted there."""
    path = plan.folder / PLAN
    held = json.loads(json.dumps(plan.held()))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = first_difference(held, before, ignoring=_FREE)
        if changed is not None:
            raise InputError(
                f"{changed.key.removeprefix('settings.')}: found {changed.one!r}; expected "
                f"{changed.other!r}, as {path} has it (another comparison needs another --out)"
            )
    elif plan.folder.is_dir() and any(plan.folder.iterdir()):
        raise InputError(f"{plan.folder}: found files; expected a comparison, or an empty folder")
    else:
        write_text(path, json.dumps(held, indent=2) + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Hold the lock of `folder`; its descriptor, which children inherit, so that one of a killed
    comparison holds it too."""
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: found another comparison at work in it") from error
        yield lock.fileno()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM, so that a child is known before anything stops its parent."""
    came: list[int] = []
    before = {
        kind: signal.signal(kind, lambda number, frame: came.append(number))
        for kind in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if came:
        signal.raise_signal(came[0])


def _work(folder: Path, stage: Stage, what: str, lock: int) -> None:
    """Train one stage in a process of its own; its output goes to ``<stage>.log``."""
    command = [sys.executable, "-m", "spectralx.comparison.work", str(folder), stage]
    process: subprocess.Popen[bytes] | None = None
    with open(folder / f"{stage}.log", "w", encoding="utf-8") as log:
        try:
            with _undisturbed():
                process = subprocess.Popen(command, stdout=log, pass_fds=(lock,))
            status = process.wait()
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()
    if status:
        raise RuntimeError(
            f"{what}: {stage} ended with status {status}; its output is in {log.name}, finished "
            "runs are kept"
        )


def _prepare(folder: Path, settings: Settings) -> None:
    write_text(folder / SETTINGS, yaml.safe_dump(settings.as_dict()))


def _backbone(plan: Plan, task: Task, lock: int) -> Path | None:
    """File of the optical backbone that all methods start from, trained if it is not there."""
    if plan.pretrain == 0:
        return None
    folder = plan.folder / PRETRAINING
    if not record_path(folder, "stage1").is_file():
        root = optical_copy(task, folder / "images", progress=plan.settings.trainer.progress)
        _prepare(folder, optical_settings(plan.settings, root, folder, plan.pretrain))
        _work(folder, "stage1", "optical backbone", lock)
    best = checkpoints.load(folder / "stage1" / "best")
    return best.path / str(best.manifest["tensors"]["file"])


def run_all(plan: Plan, minutes: float | None = None) -> None:
    """Train what is not finished of `plan`.

    Parameters
    ----------
    plan : what is compared.
    minutes : start no stage after so many; the next call goes on. None for no limit.

    Raises
    ------
    InputError : settings that contradict each other or the folder's.
    RuntimeError : a run that failed; those before it are kept.
    KeyboardInterrupt : the minutes are over, with stages left.
    """
    started = time.monotonic()
    settings = plan.settings
    if plan.pretrain and settings.model.backbone_weights is not None:
        raise InputError(
            f"pretrain: found {plan.pretrain}; expected 0 with model.backbone_weights, "
            f"{settings.model.backbone_weights}"
        )
    if settings.stage2.init_from != FROM_STAGE1:
        stage1_checkpoint(settings)
    task = TaskData(settings.data, settings.stage2.run).task  # says what is wrong with the data
    _hold(plan)
    with _alone(plan.folder) as lock:
        backbone = _backbone(plan, task, lock)
        steps = [(run, stage) for run in plan.runs for stage in plan.stages]
        shown = tqdm(steps, desc="comparison", unit="stage", disable=not settings.trainer.progress)
        for done, (run, stage) in enumerate(shown):
            if finished(run, stage) is None:
                if minutes is not None and time.monotonic() - started > 60 * minutes:
                    raise KeyboardInterrupt(
                        f"{done} of {len(steps)} stages are finished; the same command goes on"
                    )
                shown.set_postfix_str(f"{run.method.title}, seed {run.seed}, {stage}")
                own = method_settings(
                    settings, run.method, seed=run.seed, out=run.folder, backbone=backbone
                )
                _prepare(run.folder, own)
                _work(run.folder, stage, f"{run.method.title}, seed {run.seed}", lock)
