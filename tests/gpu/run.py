"""Everything there is to run on a GPU, in one command: build, tests, benchmarks, sanitizer.

    make gpu                     or    python -m tests.gpu.run [--part tests|bench|sanitize]
                                         [--built] [--without NAME ...] [--dry-run] [--out DIR]

Builds the extension for ``TORCH_CUDA_ARCH_LIST`` (9.0a where it is not set) in place, then runs
the parts one after the other, each command within its own time limit (together under ten
minutes), and goes on after one that fails; ``--built`` takes the extension that is there. Nothing
is downloaded. Results are written to ``benchmarks/results/``: ``<device>-graphs.md/.json`` (replays
of CUDA graphs: the GPU's time), ``<device>.md/.json`` (with the host's), and
``<device>-gpu.md/.json``: what ran, at which commit, for how long, with which status.

Ends with status 1, naming what failed; with 2 and one line where torch sees no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "build" / "gpu"
PARTS = ("build", "tests", "bench", "sanitize")
PYTHON = sys.executable
TAIL = 40  # lines of a failing command's output that are kept


@dataclass(frozen=True)
class Command:
    """One command of a part: its words, time limit in seconds and additional environment."""

    part: str
    name: str
    words: list[str]
    limit: int
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        given = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*given, shlex.join(self.words)])


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `status` is its exit status, or None where the limit ended it."""

    part: str
    name: str
    command: str
    status: int | None
    seconds: float
    limit: int
    tail: list[str]

    @property
    def passed(self) -> bool:
        return self.status == 0

    @property
    def verdict(self) -> str:
        if self.status is None:
            return f"over its limit of {self.limit} s"
        return "passed" if self.passed else f"failed with status {self.status}"


def commands(out: Path) -> list[Command]:
    """All commands, in order."""
    build = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
    }
    bench = [PYTHON, "-m", "pytest", "-q", "--device", "cuda", "--full"]
    bench += ["--dtype", "bfloat16"]
    graphs = ["benchmarks/bench_aomoa.py", "benchmarks/bench_upsample.py"]
    graphs += ["benchmarks/bench_decoder.py", "--graphs", "-k"]
    graphs += ["(b1 or b32 or decoder) and not compile and not stage1 and not e8 and not e16"]
    hosted = ["benchmarks/bench_aomoa.py", "-k", "(b1 or b32) and not stage1 and not compile"]
    compiled = ["benchmarks/bench_aomoa.py", "-k", "b8"]
    report = [PYTHON, "-m", "benchmarks.report"]
    watched = ["--error-exitcode", "1", PYTHON, "-m", "tests.gpu.sanitized"]
    workers = str(min(os.cpu_count() or 1, 15))
    parallel = ["-n", workers] if importlib.util.find_spec("xdist") is not None else []
    # Every tensor its own allocation, so that a read past its end is one past an allocation.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    files = {name: SCRATCH / f"{name}.json" for name in ("graphs", "hosted", "compiled")}
    graphs, hosted, compiled = (
        [*bench, *rows, f"--benchmark-json={files[name]}"]
        for name, rows in (("graphs", graphs), ("hosted", hosted), ("compiled", compiled))
    )
    return [
        Command(
            "build", "extension",
            [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 150, build,
        ),
        Command(
            "tests", "gpu", [PYTHON, "-m", "pytest", *parallel, "-q", "-m", "gpu", "tests/gpu"],
            120, {"OMP_NUM_THREADS": "1"},
        ),
        Command("bench", "graphs", graphs, 100),
        Command("bench", "graphs report", [*report, str(files["graphs"]), "--out", str(out)], 10),
        Command("bench", "hosted", hosted, 60),
        Command("bench", "compiled", compiled, 50),
        Command("bench", "merge", [PYTHON, "-m", "tests.gpu.run", "--merge"], 10),
        Command("bench", "report", [*report, str(SCRATCH / "bench.json"), "--out", str(out)], 10),
        Command("sanitize", "memcheck",
                ["compute-sanitizer", "--tool", "memcheck", *watched], 40, uncached),
        Command("sanitize", "racecheck",
                ["compute-sanitizer", "--tool", "racecheck", *watched], 40),
    ]  # fmt: skip


def execute(command: Command) -> Outcome:
    """Run a command, showing its output; kill all its processes when its time is over."""
    print(f"== {command.part}: {command.name} ({command.limit} s)\n$ {command}", flush=True)
    begin, lines = time.monotonic(), list[str]()
    try:
        process = subprocess.Popen(
            command.words,
            cwd=ROOT,
            env={**os.environ, **command.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        lines, status = [str(error)], 127
        print(error)
        return _outcome(command, status, begin, lines)
    try:
        output, _ = process.communicate(timeout=command.limit)
        status_or_none: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status_or_none = None
    print(output, flush=True)
    return _outcome(command, status_or_none, begin, output.splitlines())


def _outcome(command: Command, status: int | None, begin: float, lines: list[str]) -> Outcome:
    seconds = round(time.monotonic() - begin, 1)
    kept = lines[-1:] if status == 0 else lines[-TAIL:]
    return Outcome(command.part, command.name, str(command), status, seconds, command.limit, kept)


def merge(sources: Sequence[Path], target: Path) -> int:
    """Join the rows of benchmark files, those that exist, into one; the number of rows."""
    contents = [json.loads(path.read_text()) for path in sources if path.exists()]
    if not contents:
        return 0
    rows = [row for content in contents for row in content["benchmarks"]]
    target.write_text(json.dumps({**contents[0], "benchmarks": rows}))
    return len(rows)


def write(outcomes: Sequence[Outcome], facts: Mapping[str, Any], name: str, out: Path) -> Path:
    """``<name>-gpu.json`` and ``.md`` under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-gpu.json"
    content = {"facts": dict(facts), "commands": [asdict(outcome) for outcome in outcomes]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"# {facts['device']}", "", *(f"- {key}: {facts[key]}" for key in facts), ""]
    lines += ["`make gpu`, command by command:", "", "| part | command | outcome | s | last line |"]
    lines.append("| :-- | :-- | :-- | --: | :-- |")
    for outcome in outcomes:
        last = outcome.tail[-1].replace("|", "\\|") if outcome.tail else ""
        lines.append(
            f"| {outcome.part} | {outcome.name} | {outcome.verdict} | {outcome.seconds} | {last} |"
        )
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path


def run_all(chosen: Sequence[Command]) -> tuple[list[Outcome], int]:
    """Outcomes of all commands, and the exit status; a failure stops nothing but is named."""
    outcomes = [execute(command) for command in chosen]
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failed:
        print(f"FAILED {outcome.part}: {outcome.name}, {outcome.verdict}")
    return outcomes, 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--part", choices=PARTS[1:], help="the build and this part only (default: all)"
    )
    parser.add_argument("--built", action="store_true", help="take the extension that is there")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="NAME", help="commands to leave out"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    parser.add_argument("--merge", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.merge:
        sources = [SCRATCH / "hosted.json", SCRATCH / "compiled.json"]
        rows = merge(sources, SCRATCH / "bench.json")
        print(f"{rows} rows")
        return 0 if rows else 1
    chosen = [
        command
        for command in commands(options.out)
        if (options.part is None or command.part in ("build", options.part))
        and not (options.built and command.part == "build")
        and command.name not in options.without
    ]
    if options.dry_run:
        for command in chosen:
            print(f"{command.part:<9} {command.limit:>4} s  {command}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print(
            f"make gpu: torch {torch.__version__} sees no CUDA GPU, expected one", file=sys.stderr
        )
        return 2
    from benchmarks.conftest import machine_facts
    from benchmarks.report import machine_name

    facts = machine_facts("cuda")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    for stale in SCRATCH.glob("*.json"):
        stale.unlink()
    outcomes, status = run_all(chosen)
    print(f"wrote {write(outcomes, facts, machine_name(facts), options.out)} and .md")
    return status


if __name__ == "__main__":
    sys.exit(main())
