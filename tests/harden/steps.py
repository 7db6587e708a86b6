"""Row 14: training steps of a tiny model: memory must stay level and files closed."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.harden.record import Outcome
from tests.harden.tiny import adamw, tiny_model, train_step

SETTLED = 0.1  # share of the steps after which memory is watched: 1,000 of 10,000
EVERY = 20  # steps between two looks
SLOPE = 1024.0  # bytes a step that are allowed


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def slope(steps: Sequence[int], sizes: Sequence[int]) -> float:
    """Bytes a step, by least squares."""
    return float(np.polyfit(np.asarray(steps), np.asarray(sizes, dtype=float), 1)[0])


def run(numbers: Sequence[int]) -> Outcome:
    """Step i trains on batch i."""
    model = tiny_model()
    optimizer = adamw(model)
    outcome = Outcome()
    looks: list[tuple[int, int, int]] = []
    first = numbers[0]
    for step in numbers:
        loss = train_step(model, optimizer, step)
        if not math.isfinite(loss):
            outcome.failures.append(f"step {step}: loss {loss}")
            break
        outcome.checked += 1
        if step - first >= SETTLED * len(numbers) and step % EVERY == 0:
            gc.collect()
            looks.append((step, resident(), open_files()))
    steps, sizes, files = zip(*looks, strict=True)
    found = slope(steps, sizes)
    outcome.figures = {
        "largest slope in bytes a step": round(found, 1),
        "largest growth of open files": max(files) - min(files),
    }
    if found > SLOPE:
        outcome.failures.append(f"memory grows by {found:.0f} bytes a step, expected {SLOPE:.0f}")
    if max(files) != min(files):
        outcome.failures.append(f"open files: {min(files)} to {max(files)}, expected one number")
    return outcome
