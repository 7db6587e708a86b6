"""The numerics of `make gpu` and its planted faults, as far as a CPU can show them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import numerics, planted, sanitized
from tests.harden import accuracy, routing
from tests.harden.accuracy import Kind
from tests.harden.operators import ENTRIES
from tests.harden.record import Outcome


def test_samples_of_both_rows_in_every_kind() -> None:
    outcome = numerics.drawn_samples(0, 1, 0.5, "cpu")
    assert not outcome.failures
    assert outcome.figures["samples"]["accuracy"] == outcome.figures["samples"]["routing"] > 0
    kinds = [numerics.kind_of(round_ * len(ENTRIES), "cuda") for round_ in range(4)]
    assert [str(kind) for kind in kinds] == [
        "torch.float32", "tf32", "torch.bfloat16", "torch.float16",
    ]  # fmt: skip
    assert kinds[1].rounding == torch.float16
    assert numerics.kind_of(len(ENTRIES), "cpu").rounding == torch.float32


def test_what_fails_is_named_and_ends_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(number: int, kind: Kind) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(accuracy, "sample", raises)
    monkeypatch.setattr(routing, "failures_of", lambda *_: [])
    monkeypatch.setattr(routing, "nan_tokens", lambda *_: [])
    outcome = numerics.drawn_samples(3, 5, 60.0, "cpu")
    failed = [failure for failure in outcome.failures if "illegal memory access" in failure]
    assert len(failed) == numerics.MOST
    assert failed[0].startswith("sample 3: accuracy: RuntimeError: CUDA error")


def test_memory_that_grows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter(range(0, 10**6, 512))
    monkeypatch.setattr(numerics, "allocated", lambda device: next(sizes))
    monkeypatch.setattr(numerics, "EVERY", 2)
    outcome = numerics.training(10, "cpu")
    assert outcome.checked == 10
    assert outcome.failures == ["device memory grows by 1536 bytes, expected 0"]


def test_processes_that_break_hang_or_differ_are_failures() -> None:
    def process(code: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    fine = 'print(\'{"checked": 2, "figures": {"bits": {"a": "%s"}}}\')'
    found = list(
        numerics.outcomes_of(
            {
                "fine": process(fine % "x"), "other": process(fine % "y"),
                "broken": process("raise SystemExit('no GPU left')"),
                "late": process("import time; time.sleep(60)"),
            },
            time.monotonic() + 2,
        )
    )  # fmt: skip
    assert found[2].failures == ["broken: status 1: no GPU left"]
    assert found[3].failures == ["late: not done in its time"]
    assert numerics.different(found) == ["process 1: a: other bits"]
    whole = numerics.joined([*found, Outcome(1, figures={"largest growth": 3})])
    assert (whole.checked, len(whole.failures)) == (5, 2)
    assert whole.figures["largest growth"] == 3


def test_the_watched_run_has_every_operator() -> None:
    names = {entry.name for entry, _ in sanitized.calls(True)}
    assert names == {entry.name for entry in ENTRIES}
    assert {entry.name for entry, _ in sanitized.calls(False)} < names


@pytest.mark.parametrize("blind", ["", "racecheck"])
def test_a_tool_that_misses_its_planted_fault_is_named(
    blind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "compute-sanitizer"
    says = "\n".join(f"  {name}.{name}) echo '{said}'; exit 9;;" for name, said in
                     planted.SAYS.items() if name != blind)  # fmt: skip
    # Called as: --tool NAME --error-exitcode 9 PROGRAM FAULT
    tool.write_text(f'#!/bin/sh\ncase "$2.$6" in\n{says}\nesac\necho clean\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    expected = ["racecheck: missed its planted fault, status 0: clean"] if blind else []
    assert planted.failures() == expected
