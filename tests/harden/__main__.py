"""``python -m tests.harden PART [--count N] [--seed S]``: one row of docs/RELIABILITY.md.

Samples are numbered; a run takes those from S on and adds them to ``docs/reliability/PART.json``,
so that slices of a long row add up; those that hold a sample that is run again are dropped.
``page`` for PART writes the page, ``list`` says which parts there are, ``all`` runs them
(``--quick`` as far as ``make test`` does). Status 1: a sample failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Sequence

import tests.conftest  # noqa: F401  Triton's interpreter, before anything imports triton
from tests.harden import page, record
from tests.harden.parts import PARTS


def run_part(name: str, seed: int, count: int) -> int:
    """Runs a part, records what it found, prints failures; the exit status."""
    from tqdm import tqdm

    part = PARTS[name]
    module = importlib.import_module(f"tests.harden.{part.module}")
    numbers = range(seed, seed + count)
    started = time.perf_counter()
    outcome = module.run(numbers if part.whole else tqdm(numbers, desc=name, mininterval=5))
    path = record.append(name, seed, count, time.perf_counter() - started, outcome)
    for failure in outcome.failures:
        print(failure)
    print(
        f"{name}: {outcome.checked} samples, {len(outcome.failures)} failures; {path}",
        flush=True,
    )
    return 1 if outcome.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.harden", description=__doc__)
    runnable = [name for name, part in PARTS.items() if part.module]
    parser.add_argument("part", choices=[*runnable, "all", "page", "list"], metavar="PART")
    parser.add_argument("--count", type=int, help="samples; those the row asks for by default")
    parser.add_argument("--seed", type=int, default=0, help="number of the first sample")
    parser.add_argument("--quick", action="store_true", help="the samples that make test runs")
    given = parser.parse_args(argv)
    if given.part == "page":
        page.write()
        print(page.PAGE)
        return 0
    if given.part == "list":
        for name in runnable:
            print(f"{name:14} row {PARTS[name].row:2}, {PARTS[name].count:6,} samples")
        return 0
    warnings.filterwarnings("ignore")
    failed = 0
    for name in runnable if given.part == "all" else [given.part]:
        part = PARTS[name]
        if given.part == "all" and given.quick and not part.quick:
            continue
        count = given.count or (part.quick if given.quick else part.count) or part.count
        failed |= run_part(name, given.seed, count)
    return failed


if __name__ == "__main__":
    sys.exit(main())
