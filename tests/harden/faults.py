"""Stop training in other ways than by killing it: ``python -m tests.harden faults``.

SIGTERM at a random moment, a full disk at a random saving, a data-loading process killed. After
each, what was saved before must be whole, the message one line, the status the documented one; a
killed data-loading process must end the run within 10 seconds. The same command then goes on to the
end, and what it leaves is compared with an undisturbed run, bit for bit.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spectralx.cli import RUN_STATUS, STOP_STATUS
from spectralx.data.scenes import write_scenes
from tests.harden.record import Outcome
from tests.harden.runs import (
    CONTEXT,
    LONGEST,
    Case,
    Pace,
    differences,
    finish,
    full_child,
    measure,
    outcome,
    start,
    tell,
    unloadable,
)

WITHIN = 10.0  # seconds from a data-loading process's end to the run's


def terminate(case: Case, folder: Path, pace: Pace, draw: random.Random) -> list[str]:
    """SIGTERM while it trains; returns what was wrong."""
    process, connection = start(case, folder)
    connection.recv()  # the first saving: it trains
    time.sleep(draw.uniform(0, pace.seconds / 2))
    if process.is_alive():
        tell(process, signal.SIGTERM)
    process.join(LONGEST)
    text = (folder / "output.txt").read_text()
    wrong = []
    if process.exitcode == STOP_STATUS and "the same command goes on" not in text:
        wrong.append(f"said {text!r}")
    if process.exitcode not in (0, STOP_STATUS, -signal.SIGTERM):
        wrong.append(f"status {process.exitcode}")
    return wrong + unloadable(folder / "run" / case.stage)


def fill(case: Case, folder: Path, pace: Pace, draw: random.Random) -> list[str]:
    """Run some way, then go on with the disk full at the next saving; returns what was wrong."""
    process, connection = start(case, folder)
    for _ in range(2 * draw.randrange(3, 6)):
        connection.recv()
    process.kill()
    process.join()
    run = folder / "run" / case.stage
    kept = sorted(path.name for path in (run / "resume").glob("step-*"))
    size = min(path.stat().st_size for path in (run / "resume").glob("step-*"))
    process = CONTEXT.Process(
        target=full_child, args=(case, folder, draw.randrange(size // 2, size))
    )
    process.start()
    process.join(LONGEST)
    text = (folder / "output.txt").read_text()
    wrong = []
    if process.exitcode != RUN_STATUS or "could not be" not in text.splitlines()[-1]:
        wrong.append(f"status {process.exitcode}, said {text!r}")
    if kept != sorted(path.name for path in (run / "resume").glob("step-*")):
        wrong.append("the states before are not those before")
    return wrong + unloadable(run)


def _workers(pid: int) -> list[int]:
    """Processes that `pid` started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(each) for each in (task / "children").read_text().split()]
    return found


def bereave(case: Case, folder: Path, pace: Pace, draw: random.Random) -> list[str]:
    """Kill a data-loading process; returns what was wrong."""
    process, connection = start(case, folder)
    connection.recv()
    time.sleep(draw.uniform(0, pace.seconds / 8))
    while not (workers := _workers(process.pid)) and process.is_alive():
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(draw.choice(workers), signal.SIGKILL)
    process.join(LONGEST)
    seconds = time.monotonic() - began
    text = (folder / "output.txt").read_text()
    wrong = []
    if process.exitcode == RUN_STATUS and "spectralx.train: error: DataLoader worker" not in text:
        wrong.append(f"said {text!r}")
    # It may have ended on its own: the last batches were there already.
    if process.exitcode not in (0, RUN_STATUS):
        wrong.append(f"status {process.exitcode}, said {text!r}")
    if process.exitcode == RUN_STATUS and "Traceback" in text:
        wrong.append(f"more than a line: {text!r}")
    if seconds > WITHIN:
        wrong.append(f"took {seconds:.1f} s")
    return wrong + unloadable(folder / "run" / case.stage)


# The fault, and the data-loading processes of the run it befalls.
FAULTS: dict[str, tuple[int, Callable[[Case, Path, Pace, random.Random], list[str]]]] = {
    "SIGTERM": (0, terminate),
    "full disk": (0, fill),
    "killed worker": (2, bereave),
}


def run(numbers: Iterable[int]) -> Outcome:
    """Run the trials of these numbers, the faults and the stages in turn."""
    failures: list[str] = []
    counts = dict.fromkeys(FAULTS, 0)
    checked = 0
    wanted: dict[Case, tuple[Pace, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        scenes = write_scenes("whu-ohs", folder / "scenes", size=32, count=10, progress=False)
        for number in numbers:
            fault = list(FAULTS)[number % len(FAULTS)]
            workers, inflict = FAULTS[fault]
            case = Case(("stage1", "stage2")[number // len(FAULTS) % 2], workers, scenes)
            if case not in wanted:
                calm = folder / f"calm-{case.stage}-{workers}"
                wanted[case] = measure(case, calm), outcome(calm / "run" / case.stage)
            pace, expected = wanted[case]
            trial = folder / f"trial-{number}"
            wrong = inflict(case, trial, pace, random.Random(number))
            status = finish(case, trial)
            found = outcome(trial / "run" / case.stage) if status == 0 else {}
            wrong += differences(expected, found) if found else [f"then status {status}"]
            checked += 1
            counts[fault] += not wrong
            failures += [f"{number} ({fault}, {case.stage}): {each}" for each in wrong]
            shutil.rmtree(trial)
    return Outcome(checked, failures, {"as they must be": counts})
