"""`make gpu` as far as it goes without a GPU: what it would run, and what it does with failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import run
from tests.gpu.run import Command, merge, run_all, write


def test_dry_run_names_every_part_within_ten_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run"]) == 0
    shown = capsys.readouterr().out
    for wanted in ("FORCE_CUDA=1", "TORCH_CUDA_ARCH_LIST=9.0a", "-m gpu", "--device cuda",
                   "bfloat16", "--graphs", "memcheck", "racecheck"):  # fmt: skip
        assert wanted in shown
    everything = run.commands(Path("out"))
    assert sum(command.limit for command in everything) < 600
    assert {command.part for command in everything} == set(run.PARTS)
    assert run.main(["--dry-run", "--part", "sanitize"]) == 0
    parts = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert parts == {"build", "sanitize"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_so_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert "no CUDA GPU" in found.err


def test_goes_on_after_a_failure_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(name: str, code: str, limit: int = 20) -> Command:
        return Command("tests", name, [sys.executable, "-c", code], limit, {"MARK": "here"})

    hangs = "import subprocess, sys; print('begun', flush=True);" + (
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    outcomes, status = run_all(
        [
            command("breaks", "import sys; print('why'); sys.exit(3)"),
            command("hangs", hangs, limit=1),
            Command("sanitize", "is missing", ["no-such-tool-here"], 5),
            command("works", "import os; print(os.environ['MARK'])"),
        ]
    )
    assert status == 1
    verdicts = [outcome.verdict for outcome in outcomes]
    assert verdicts == [
        "failed with status 3", "over its limit of 1 s", "failed with status 127", "passed",
    ]  # fmt: skip
    assert [outcome.tail[-1] for outcome in (*outcomes[:2], outcomes[3])] == [
        "why",
        "begun",
        "here",
    ]
    assert outcomes[1].seconds < 10
    shown = capsys.readouterr().out
    assert "FAILED tests: breaks, failed with status 3" in shown
    assert "FAILED sanitize: is missing" in shown
    assert "FAILED tests: works" not in shown
    path = write(outcomes, {"device": "A GPU", "commit": "abc"}, "a-gpu", tmp_path)
    assert json.loads(path.read_text())["facts"]["commit"] == "abc"
    assert "| tests | hangs | over its limit of 1 s |" in path.with_suffix(".md").read_text()


def test_benchmark_files_are_joined(tmp_path: Path) -> None:
    for name, groups in (("one", ["a"]), ("two", ["b", "c"])):
        rows = [{"group": group} for group in groups]
        (tmp_path / name).write_text(json.dumps({"datetime": name, "benchmarks": rows}))
    sources = [tmp_path / name for name in ("one", "two", "missing")]
    assert merge(sources, tmp_path / "out") == 3
    joined = json.loads((tmp_path / "out").read_text())
    assert [row["group"] for row in joined["benchmarks"]] == ["a", "b", "c"]
    assert merge([tmp_path / "missing"], tmp_path / "none") == 0


def test_gpu_tests_skip_aloud() -> None:
    """All of tests/gpu is collected, marked, and without a GPU skipped with the reason."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"],
        capture_output=True, text=True, cwd=run.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT RUN: torch sees no CUDA GPU" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
