"""Kill training at random and look at what comes of it: ``python -m tests.harden kills``.

Each trial starts a run of a tiny model, kills it with SIGKILL at a random moment or in the middle
of a random saving, looks whether everything it left can be read, runs the same command to the end,
and compares weights, optimiser, random generators, logs, scores and pictures with those of a run
that nobody disturbed, bit for bit. Both stages, with 0 and 2 data-loading processes in turn.

Trials are numbered, and a number decides all about its trial.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from spectralx.data.scenes import write_scenes
from tests.harden.record import Outcome
from tests.harden.runs import Case, Kind, differences, finish, kill, measure, outcome, unloadable

KINDS: tuple[Kind, ...] = ("time", "saving")


def run(numbers: Iterable[int]) -> Outcome:
    """Run the trials of these numbers."""
    failures: list[str] = []
    counts = {"kills": 0, "while saving": 0, "unloadable": 0, "bitwise-equal finishes": 0}
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        scenes = write_scenes("whu-ohs", folder / "scenes", size=32, count=10, progress=False)
        start = folder / "start"
        if finish(Case("stage1", 0, scenes), start) != 0:
            raise RuntimeError((start / "output.txt").read_text())
        cases = [
            Case(stage, workers, scenes, start / "run" / "stage1" / "best")
            for stage, workers in itertools.product(("stage1", "stage2"), (0, 2))
        ]
        plans = list(itertools.product(KINDS, cases))
        wanted = {}
        for number in numbers:
            kind, case = plans[number % len(plans)]
            if case not in wanted:
                calm = folder / f"calm-{case.stage}-{case.workers}"
                wanted[case] = measure(case, calm), outcome(calm / "run" / case.stage)
            pace, expected = wanted[case]
            trial = folder / f"trial-{number}"
            run = trial / "run" / case.stage
            counts["kills"] += 1
            counts["while saving"] += kill(case, trial, pace, kind, random.Random(number))
            faults = unloadable(run)
            status = finish(case, trial)
            wrong = differences(expected, outcome(run)) if status == 0 else [f"status {status}"]
            if status != 0:
                wrong.append((trial / "output.txt").read_text())
            counts["unloadable"] += bool(faults)
            counts["bitwise-equal finishes"] += not wrong
            failures += [
                f"{number} ({kind}, {case.stage}, {case.workers} workers): {fault}"
                for fault in [*faults, *wrong]
            ]
            shutil.rmtree(trial)
    return Outcome(counts["kills"], failures, dict(counts))
