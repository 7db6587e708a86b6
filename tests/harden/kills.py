"""Kill training at random and look at what comes of it: ``python -m tests.harden.kills``.

Each trial starts a run of a tiny model, kills it with SIGKILL at a random moment or in the middle
of a random saving, looks whether everything it left can be read, runs the same command to the end,
and compares weights, optimiser, random generators, logs, scores and pictures with those of a run
that nobody disturbed, bit for bit. Both stages, with 0 and 2 data-loading processes in turn.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from spectralx.data.scenes import write_scenes
from tests.harden.runs import (
    Case,
    Kind,
    differences,
    finish,
    kill,
    measure,
    outcome,
    unloadable,
)

KINDS: tuple[Kind, ...] = ("time", "saving")


def main() -> int:
    """Prints one line for each failure and the figure; status 1 if any trial failed."""
    parser = argparse.ArgumentParser(prog="tests.harden.kills")
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    counts = {"unloadable": 0, "different": 0, "saving": 0}
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
        wanted = {}
        for case in cases:
            calm = folder / f"{case.stage}-{case.workers}"
            pace = measure(case, calm)
            wanted[case] = pace, outcome(calm / "run" / case.stage)
            print(
                f"{case.stage}, {case.workers} workers: {pace.seconds:.2f} s undisturbed, "
                f"{len(pace.savings)} savings of {sum(pace.savings):.2f} s"
            )
        trials = list(
            itertools.islice(itertools.cycle(itertools.product(KINDS, cases)), options.count)
        )
        for number, (kind, case) in enumerate(tqdm(trials, unit="kill", file=sys.stderr)):
            pace, expected = wanted[case]
            trial = folder / f"trial-{number}"
            run = trial / "run" / case.stage
            counts["saving"] += kill(case, trial, pace, kind, draw)
            faults = unloadable(run)
            counts["unloadable"] += bool(faults)
            status = finish(case, trial)
            wrong = differences(expected, outcome(run)) if status == 0 else [f"status {status}"]
            counts["different"] += bool(wrong)
            for fault in [*faults, *wrong]:
                print(f"kill {number} ({kind}, {case.stage}, {case.workers} workers): {fault}")
            if status:
                print((trial / "output.txt").read_text())
            shutil.rmtree(trial)
    print(
        f"{options.count} kills, {counts['saving']} of them while saving: "
        f"{counts['unloadable']} unloadable, {options.count - counts['different']} bitwise-equal "
        "finishes"
    )
    return 1 if counts["unloadable"] or counts["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
