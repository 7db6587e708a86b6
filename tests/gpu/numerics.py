"""Rows 3, 4, 14 and 15 of docs/RELIABILITY.md on a GPU, as far as the time goes.

    python -m tests.gpu.numerics [--seconds N] [--processes N] [--device cuda|cpu]

All at once: processes that draw calls, for ``--seconds``, accuracy and routing on every backend of
the GPU in float32, TF32, bfloat16, float16 (`tests.harden.accuracy`, ``routing``); 5 that together
repeat calls 100 times, for the same bits (``determinism``); one that trains a tiny model for 10,000
steps and looks at the device's memory. Truth and, but for TF32, the reference's own error are
those of the CPU. What was found is added to ``docs/reliability/gpu-numerics.json``, row 18, and
printed; status 1 if a sample failed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from tests.harden import accuracy, determinism, record, routing, steps
from tests.harden.accuracy import Kind
from tests.harden.record import Outcome
from tests.harden.tiny import adamw, tiny_model, train_step

PART = "gpu-numerics"
STEPS, RUNS, PROCESSES = 10_000, 100, 5
MOST = 50  # failures of a process: behind a fault of the GPU every call fails
SETTLED, EVERY = 1000, 50  # steps before memory is looked at, and between two looks
KINDS = (
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.float16, False),
)


def kind_of(number: int, device: str) -> Kind:
    """What a sample is computed in: in turns, all kinds for every operator."""
    dtype, tf32 = KINDS[(number // len(accuracy.ENTRIES)) % len(KINDS)]
    return Kind(dtype, device, tf32 and device == "cuda")


def precision(tf32: bool) -> None:
    """Whether float32 products and convolutions may be rounded to TF32; the same bits each time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def accuracy_failures(number: int, device: str, outcome: Outcome) -> None:
    """Row 3."""
    kind = kind_of(number, device)
    precision(kind.tf32)
    entry, failures, ratios, _ = accuracy.sample(number, kind)
    outcome.failures += failures
    for side, ratio in ratios.items():
        worst = outcome.figures.setdefault(f"worst {side} ratio, {kind}", {})
        worst[entry.name] = max(worst.get(entry.name, 0.0), round(ratio, 3))


def routing_failures(number: int, device: str, outcome: Outcome) -> None:
    """Row 4; TF32 changes no number that is compared but the match's, which it may tie."""
    dtype, tf32 = KINDS[number % len(KINDS)]
    precision(tf32)
    if tf32 and routing.case_of(number)[0] is routing.MATCH:
        precision(False)
    outcome.failures += routing.failures_of(number, device, dtype)
    outcome.failures += routing.nan_tokens(number, device, dtype)


ROWS: dict[str, Callable[[int, str, Outcome], None]] = {
    "accuracy": accuracy_failures,
    "routing": routing_failures,
}


def attempt(row: str, number: int, device: str, outcome: Outcome) -> None:
    """One sample; an exception is a failure of the sample, and the next ones still run."""
    try:
        ROWS[row](number, device, outcome)
    except Exception as error:  # a kernel that raises has failed here as one that is wrong
        said = str(error).strip().splitlines() or [""]
        where = f"sample {number}: {row}: {type(error).__name__}: {said[0][:300]}"
        outcome.failures.append(where)
    outcome.checked += 1
    counts = outcome.figures.setdefault("samples", {})
    counts[row] = counts.get(row, 0) + 1


def drawn_samples(share: int, shares: int, seconds: float, device: str) -> Outcome:
    """Samples of rows 3 and 4 in turns, those of the share, until the time is over."""
    outcome, end, number = Outcome(), time.monotonic() + seconds, share
    while time.monotonic() < end and len(outcome.failures) < MOST:
        for row in ROWS:
            attempt(row, number, device, outcome)
        number += shares
    return outcome


def training(count: int, device: str) -> Outcome:
    """Row 14: `count` steps, the device's memory level after the first thousand."""
    precision(False)
    model = tiny_model().to(device)
    optimizer = adamw(model)
    looks: list[int] = []
    outcome = Outcome()
    for step in range(count):
        loss = train_step(model, optimizer, step)
        if not math.isfinite(loss):
            outcome.failures.append(f"step {step}: loss {loss}")
            break
        outcome.checked += 1
        if step >= min(SETTLED, count // 10) and step % EVERY == 0:
            looks.append(allocated(device))
    growth = max(looks, default=0) - min(looks, default=0)
    outcome.figures = {"training steps": outcome.checked, "largest growth of device memory": growth}
    if growth:
        outcome.failures.append(f"device memory grows by {growth} bytes, expected 0")
    return outcome


def allocated(device: str) -> int:
    """Bytes of live tensors on the device; of a CPU the process's."""
    if device == "cpu":
        return steps.resident()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def same_bits(runs: int, device: str) -> Outcome:
    """Row 15 in this process."""
    precision(False)
    expected = determinism.digests(triton=False, device=device)
    outcome = Outcome(figures={"digests": {"of one run": len(expected)}})
    for number in range(runs):
        found = determinism.digests(triton=False, device=device)
        outcome.failures += determinism.differences(expected, found, f"run {number}")
        outcome.checked += 1
    outcome.figures["bits"] = expected
    return outcome


WORKERS: dict[str, Callable[..., Outcome]] = {
    "samples": drawn_samples,
    "training": training,
    "bits": same_bits,
}


def worker(name: str, *arguments: Any) -> subprocess.Popen[str]:
    """A process that runs one of `WORKERS` and prints its outcome as JSON."""
    code = (
        "import json, sys, warnings; warnings.simplefilter('ignore'); "
        "from dataclasses import asdict; from tests.gpu import numerics; "
        "found = numerics.WORKERS[sys.argv[1]](*json.loads(sys.argv[2])); "
        "print(json.dumps(asdict(found)))"
    )
    command = [sys.executable, "-c", code, name, json.dumps(arguments)]
    return subprocess.Popen(
        command, cwd=record.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcomes_of(processes: dict[str, subprocess.Popen[str]], end: float) -> Iterator[Outcome]:
    """What the processes found; one that does not end in time or breaks is a failure."""
    for name, process in processes.items():
        try:
            said, errors = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            yield Outcome(failures=[f"{name}: not done in its time"])
            continue
        if process.returncode:
            last = (errors.strip().splitlines() or ["nothing said"])[-1]
            yield Outcome(failures=[f"{name}: status {process.returncode}: {last[:300]}"])
            continue
        yield Outcome(**json.loads(said.strip().splitlines()[-1]))


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """All outcomes as one, figures by the rules of `record`."""
    whole = Outcome()
    for each in outcomes:
        whole.checked += each.checked
        whole.failures += each.failures
        for name, value in each.figures.items():
            known = name in whole.figures
            whole.figures[name] = (
                record.joined(name, whole.figures[name], value) if known else value
            )
    return whole


def different(outcomes: Sequence[Outcome]) -> list[str]:
    """Digests in which processes differ."""
    bits = [each.figures.pop("bits") for each in outcomes if "bits" in each.figures]
    return [
        failure
        for place, found in enumerate(bits[1:], 1)
        for failure in determinism.differences(bits[0], found, f"process {place}")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.numerics", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=130.0, help="of rows 3 and 4")
    parser.add_argument("--limit", type=float, default=280.0, help="of everything, in seconds")
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--runs", type=int, default=RUNS, help="of row 15, over all processes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("--device: got cuda, but torch sees no GPU", file=sys.stderr)
        return 2
    begin = time.monotonic()
    end, device = begin + given.limit, given.device
    runs, count = -(-given.runs // PROCESSES), given.processes
    # All at once: most of the time goes into compiling, on the CPU.
    train = {"training": worker("training", given.steps, device)}
    bits = {f"bits {place}": worker("bits", runs, device) for place in range(PROCESSES)}
    drawn = {
        f"samples {share}": worker("samples", share, count, given.seconds, device)
        for share in range(count)
    }
    # A sample under way when the time is over is let end.
    found = list(outcomes_of(drawn, begin + given.seconds + (given.limit - given.seconds) / 2))
    repeated = list(outcomes_of(bits, end))
    found += [*outcomes_of(train, end), *repeated]
    found.append(Outcome(failures=different(repeated)))
    whole = joined(found)
    whole.figures["processes compared"] = sum(not each.failures for each in repeated)
    where = ""
    if device == "cuda":  # row 18 is of a GPU
        count = max(whole.checked, 1)
        where = f"; {record.append(PART, 0, count, time.monotonic() - begin, whole)}"
    for failure in whole.failures:
        print(failure)
    print(json.dumps(asdict(whole)["figures"], indent=1))
    print(f"numerics: {whole.checked} samples, {len(whole.failures)} failures{where}", flush=True)
    return 1 if whole.failures else 0


if __name__ == "__main__":
    sys.exit(main())
