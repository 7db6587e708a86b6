"""Row 15: the same inputs give the same bits, 100 times over and in 5 processes.

A digest covers outputs and gradients of every operator on every backend of the CPU, and weights
and losses after a few training steps of a tiny model.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from tests.harden import poison
from tests.harden.operators import ENTRIES
from tests.harden.record import ROOT, Outcome
from tests.harden.tiny import adamw, tiny_model, train_step

PROCESSES = 5
STEPS = 3
# Rounds of row 1's calls: one with Triton's interpreter, one in each of two half types.
ROUNDS = (0, 1, 2, 3)


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def operator_digests(*, triton: bool, device: str = "cpu") -> dict[str, str]:
    """By operator and backend; on a CPU with `triton` the round of its interpreter too."""
    found = {}
    for round_ in ROUNDS:
        if round_ == 1 and not triton:
            continue
        for place in range(len(ENTRIES)):
            number = round_ * len(ENTRIES) + place
            for where, results in poison.bits_of_contract(number, device):
                found[f"sample {number}: {where}"] = digest_of(results.items())
    return found


def training_digest(device: str = "cpu") -> str:
    """Of the losses and every tensor of the tiny model after some steps."""
    model = tiny_model().to(device)
    optimizer = adamw(model)
    losses = torch.tensor([train_step(model, optimizer, step) for step in range(STEPS)])
    return digest_of([("losses", losses), *model.state_dict().items()])


def digests(*, triton: bool, device: str = "cpu") -> dict[str, str]:
    return {
        **operator_digests(triton=triton, device=device),
        "training": training_digest(device),
    }


def in_another_process() -> dict[str, str]:
    """The digests of a new process with its own hash seed."""
    code = (
        "import json, sys; from tests.harden.determinism import digests; "
        "json.dump(digests(triton=False), sys.stdout)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "random"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(run.stdout)
    return found


def differences(expected: dict[str, str], found: dict[str, str], where: str) -> list[str]:
    return [
        f"{where}: {name}: other bits" for name, value in found.items() if expected[name] != value
    ]


def run(numbers: Iterable[int]) -> Outcome:
    """Sample i is run i in this process; each twentieth run starts another process too."""
    outcome = Outcome(figures={"processes": 0})
    expected = digests(triton=True)
    for number in numbers:
        found = digests(triton=number % 10 == 0)
        outcome.failures += differences(expected, found, f"run {number}")
        outcome.checked += 1
        if number % (100 // PROCESSES) == 0:
            outcome.failures += differences(expected, in_another_process(), f"process {number}")
            outcome.figures["processes"] += 1
    outcome.figures["digests"] = {"of one run": len(expected)}
    return outcome
