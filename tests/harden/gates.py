"""Row 13: the compile gates, `make gates`: sample 0 is nvcc's, sample 1 Triton's, all sizes.

A gate that skips, because its compiler is not here, counts as not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable

from tests.harden.record import ROOT, Outcome

GATES = ("nvcc", "triton_gate")
_COUNTED = re.compile(r"^(\d+) of (\d+) .*compilations", re.MULTILINE)


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome(figures={"compilations": {}})
    # The interpreter, which the other parts run Triton in, compiles nothing.
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    for number in numbers:
        gate = GATES[number]
        found = subprocess.run(
            [sys.executable, "-m", f"tests.compile_gates.{gate}"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        counted = _COUNTED.search(found.stdout)
        if counted is None:
            last = (found.stdout + found.stderr).strip().splitlines()[-1:]
            if found.returncode or "SKIPPED" not in found.stdout:
                outcome.failures.append(f"sample {number}: {gate}: {' '.join(last)[:200]}")
            else:
                outcome.exceptions += last
            continue
        outcome.checked += 1
        outcome.figures["compilations"][gate] = int(counted[2])
        if found.returncode:
            outcome.failures.append(f"sample {number}: {gate}: {counted[0]}")
    return outcome
