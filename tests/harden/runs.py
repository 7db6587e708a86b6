"""Training runs in processes of their own, to be killed, and what they leave, to be compared.

Processes are forked from a server that has everything imported, so each starts in no time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spectralx import callbacks, checkpoints, keep_state, train
from spectralx.logs import METRICS, SPEED
from spectralx.resume import load_state
from tests.spectralx.tiny import TINY

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.harden.runs"])

# Long enough to be interrupted anywhere: validations at 4 and 8, a state every 2nd step.
OPTIONS = (
    "--{stage}.run.steps=8",
    "--{stage}.run.validate_every=4",
    "--{stage}.run.save_every=2",
    "--{stage}.run.pictures=0",
    "--{stage}.optimizer.schedule=plateau",
    "--{stage}.optimizer.patience=0",
)
LONGEST = 300.0  # seconds that one run may take on a busy machine

Kind = Literal["time", "saving"]


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes
    ----------
    stage : to train.
    workers : data-loading processes.
    scenes : folder of the data.
    start : checkpoint of stage 1 for stage 2, or None.
    options : more options of the command; "{stage}" stands for the stage.
    """

    stage: str
    workers: int
    scenes: Path
    start: Path | None = None
    options: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Of ``spectralx.train``, relative to the folder it runs in."""
        start = "null" if self.start is None else str(self.start)
        return [
            self.stage,
            "--config=tiny.yaml",
            f"--data.root={self.scenes}",
            f"--data.workers={self.workers}",
            "--trainer.threads=1",
            "--out=run",
            *([f"--stage2.init_from={start}"] if self.stage == "stage2" else []),
            *(option.replace("{stage}", self.stage) for option in (*OPTIONS, *self.options)),
        ]


def _announced(connection: Connection, function: Any) -> Any:
    """`function`, telling the other end when it begins and when it has ended."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        connection.send("begins")
        try:
            return function(*arguments, **options)
        finally:
            connection.send("ended")

    return wrapped


def child(case: Case, folder: Path, connection: Connection | None) -> None:
    """Body of a process: the command in `folder`, its output appended to ``output.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    # What this process starts, it starts as one from the command line does.
    multiprocessing.set_start_method(None, force=True)
    Path("tiny.yaml").write_text(TINY)
    if connection is not None:
        connection.send("ready")
        keep_state.save_state = _announced(connection, keep_state.save_state)
        save = callbacks.KeepCheckpoints._write
        callbacks.KeepCheckpoints._write = _announced(connection, save)  # type: ignore[method-assign]
    status = train.main(case.arguments())
    sys.stdout.flush()
    os._exit(status)


def full_child(case: Case, folder: Path, bytes_left: int) -> None:
    """`child` on a disk that takes no file of more than `bytes_left`."""
    # Writing past the limit fails as on a full disk: Python ignores the signal that comes with it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))
    child(case, folder, None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _member(case: Case, folder: Path, rank: int, count: int, port: int) -> None:
    """`child` as one of `count` processes, told so as torchrun does."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
    }
    child(case, folder, None)


def start_together(case: Case, folder: Path, count: int) -> list[Any]:
    """Start a run of `count` processes."""
    port = _free_port()
    group = [
        CONTEXT.Process(target=_member, args=(case, folder, rank, count, port))
        for rank in range(count)
    ]
    for process in group:
        process.start()
    return group


def finish_together(case: Case, folder: Path, count: int) -> list[int]:
    """Run `count` processes to the end; returns their exit statuses."""
    group = start_together(case, folder, count)
    until = time.monotonic() + LONGEST
    for process in group:
        process.join(max(until - time.monotonic(), 0))
        if process.is_alive():
            for each in group:
                each.kill()
            raise TimeoutError(f"{folder}: still running after {LONGEST} s")
    return [int(process.exitcode) for process in group]


def start(case: Case, folder: Path) -> tuple[Any, Connection]:
    """Start a run; the process, and the connection on which it tells of its savings.

    Returns when the process is there.
    """
    here, there = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=child, args=(case, folder, there))
    process.start()
    there.close()
    assert here.recv() == "ready"
    return process, here


def finish(case: Case, folder: Path) -> int:
    """Run to the end, undisturbed; returns the exit status."""
    process = CONTEXT.Process(target=child, args=(case, folder, None))
    process.start()
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{folder}: still running after {LONGEST} s")
    assert process.exitcode is not None
    return process.exitcode


@dataclass(frozen=True)
class Pace:
    """How long an undisturbed run took, and each of its savings, in seconds."""

    seconds: float
    savings: tuple[float, ...]


def measure(case: Case, folder: Path) -> Pace:
    """Run undisturbed, with a clock."""
    process, connection = start(case, folder)
    since = began = time.monotonic()
    savings = []
    try:
        while True:
            if connection.recv() == "begins":
                since = time.monotonic()
            else:
                savings.append(time.monotonic() - since)
    except EOFError:
        process.join(LONGEST)
    if process.exitcode != 0:
        raise RuntimeError((folder / "output.txt").read_text())
    return Pace(time.monotonic() - began, tuple(savings))


def kill(case: Case, folder: Path, pace: Pace, kind: Kind, draw: random.Random) -> bool:
    """Run, and SIGKILL at a random moment, or at one of a random saving.

    Returns
    -------
    Whether the moment was one of a saving.
    """
    process, connection = start(case, folder)
    saving, seen = False, 0
    number = draw.randrange(len(pace.savings))
    moment = time.monotonic() + draw.uniform(0, pace.seconds)
    if kind == "saving":
        moment = time.monotonic() + LONGEST
    try:
        while (left := moment - time.monotonic()) > 0 and connection.poll(left):
            saving = connection.recv() == "begins"
            if saving and kind == "saving" and seen == number:
                moment = time.monotonic() + draw.uniform(0, pace.savings[number])
            seen += saving
    except EOFError:  # it has ended before
        saving = False
    process.kill()
    process.join()
    return saving


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard shows of a run, figures of time left out."""
    events = EventAccumulator(str(folder / "tensorboard" / "version_0"))
    events.Reload()
    return [
        (tag, each.step, each.value)
        for tag in sorted(events.Tags()["scalars"])
        for each in events.Scalars(tag)
        if not tag.startswith("speed/")
    ]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a finished run left that must not depend on interruptions."""
    state = load_state(folder / "resume")
    assert state is not None
    found: dict[str, Any] = {
        "state": {name: value for name, value in state.values.items() if name != "logs"},
        "step": state.step,
        "scalars": scalars(folder),
        "speed rows": [line.split(",")[0] for line in (folder / SPEED).read_text().splitlines()],
        "leftovers": sorted(
            str(path)
            for path in folder.rglob(".*")
            if "partial" in path.name or "writing" in path.name
        ),
    }
    for name, tensor in state.tensors.items():
        found[f"tensor {name}"] = tensor.flatten().view(torch.uint8).numpy().tobytes()
    for name in (METRICS, "test.json", "finished.json", "settings.yaml", "pictures/curves.png"):
        found[name] = (folder / name).read_bytes()
    for name in ("best", "last"):
        found[f"{name} manifest"] = json.loads((folder / name / "manifest.json").read_text())
        tensors = checkpoints.load(folder / name).tensors  # checks the hash
        found[f"{name} names"] = sorted(tensors)
        found[f"{name} files"] = sorted(path.name for path in (folder / name).iterdir())
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what differs between two outcomes."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]


def unloadable(folder: Path) -> list[str]:
    """What a killed run left that cannot be read."""
    faults = []
    passed_over: list[str] = []
    try:
        load_state(folder / "resume", passed_over.append)
    except ValueError as error:
        faults.append(str(error))
    for name in ("best", "last"):
        if (folder / name / "manifest.json").exists():
            try:
                checkpoints.load(folder / name)
            except ValueError as error:
                faults.append(str(error))
    return faults + passed_over


def tell(process: Any, number: signal.Signals) -> None:
    """Send a signal to a process started here."""
    os.kill(process.pid, number)
