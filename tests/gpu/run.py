"""Everything there is to run on a GPU, in one command: build, tests, benchmarks, sanitizer.

    make gpu                     or    python -m tests.gpu.run [--part PART] [--built]
                        [--plan DTYPE:BATCH ...] [--without NAME ...] [--dry-run] [--out DIR]

Builds the extension for ``TORCH_CUDA_ARCH_LIST`` (9.0a where it is not set) in place, then runs
the parts one after the other, each command within its own time limit (together under nine
minutes), and goes on after one that fails; ``--built`` takes the extension that is there. Nothing
is downloaded. A part that is asked for by name, under nine minutes with the build too, runs more:

- ``tests``: all tests marked ``gpu``;
- ``bench``: operators, and training steps of both stages at batches of 1, 8 and 32; by name also
  the host's time beside the GPU's;
- ``steps``, by name: the steps again, and compiled;
- ``sanitize``: memcheck and racecheck on a reduced set; by name every operator, all four tools,
  after each has found a fault planted for it;
- ``tune``, by name: every backend of every operator, and which defaults are not the fastest
  (`benchmarks.tune`; ``--plan`` says in which dtypes and batches);
- ``numerics``, by name: accuracy, routing, repeatability and level memory
  (`tests.gpu.numerics`);
- ``unproven``, by name: AoMoA's tests with ``SPECTRALX_UNPROVEN=1``, and in Triton its graphs and
  host's time without and with it, to ``build/gpu/proven`` and ``build/gpu/unproven``.

Results are written to ``benchmarks/results/``, named after the device: ``<device>-graphs.md/.json``
(replays of CUDA graphs: the GPU's time), ``<device>.md/.json`` (with the host's; steps),
``<device>-tune.md/.json``, and ``<device>-gpu.md/.json``: what ran, at which commit, for how long,
with which status.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCRATCH = ROOT / "build" / "gpu"
PARTS = ("build", "tests", "bench", "steps", "sanitize", "tune", "numerics", "unproven")
PYTHON = sys.executable
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
GRACE = 6  # seconds between an interrupt and the end
TAIL = 40  # lines of a failing command's output that are kept


@dataclass(frozen=True)
class Command:
    """One command of a part: its words, time limit in seconds and additional environment. `alone`:
    it runs only where its part is asked for by name."""

    part: str
    name: str
    words: list[str]
    limit: int
    environment: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False

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


# What is timed in `make gpu`: of every operator a small and a large batch, or the largest.
GRAPHED = (
    "((test_aomoa or test_upsample_conv) and (b1- or b32) and not stage1 and not e8 and not e16"
    " and not 14-28) or (test_upsample_ce and b32) or (test_match and b32)"
    " or (test_decoder and (b1- or b8-)) or (test_hypert and (whu-32-b8 or even-128))"
    " or (test_reconstruction and 13-b16) or (test_heads and dfc-b8)"
)
STEPS = "(b1- or b8- or b32-) and not satmae and not dispatch"
ROWS = ("hosted", "compiled", "steps", "steps compiled")  # joined in <device>.md


def commands(out: Path, plan: Sequence[str] = (), part: str | None = None) -> list[Command]:
    """All commands, in order, with the limits of the whole or of a part asked for by name."""
    whole = part is None
    build = {
        "FORCE_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a"),
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
    }
    workers = str(min(os.cpu_count() or 1, 15))
    parallel = (
        ["-n", workers, "--dist", "worksteal"]
        if importlib.util.find_spec("xdist") is not None
        else []
    )

    def timed(name: str, chosen: str, limit: int, *words: str, alone: bool = False,
              part: str = "bench", file: str = "benchmarks",
            environment: Mapping[str, str] | None = None) -> Command:  # fmt: skip
        command = [PYTHON, "-m", "pytest", "-q", "-p", "no:xdist", file, "--device", "cuda"]
        command += ["--full", *words, "-k", chosen]
        # So long may the group take that is under way then; a whole step that is compiled, longest.
        command += ["--until", str(limit - (100 if part == "steps" else 25))]
        command += [f"--benchmark-json={SCRATCH / name.replace(' ', '-')}.json"]
        return Command(part, name, command, limit, environment or {}, alone)

    def reported(part: str, name: str, file: str, *, alone: bool = False) -> Command:
        words = [PYTHON, "-m", "benchmarks.report", str(SCRATCH / file), "--out", str(out)]
        return Command(part, name, words, 5, alone=alone)

    def joined(part: str, *, alone: bool = False) -> list[Command]:
        merge = [PYTHON, "-m", "tests.gpu.run", "--merge", "--out", str(out)]
        return [Command(part, "merge", merge, 5, alone=alone),
                reported(part, "report", "bench.json", alone=alone)]  # fmt: skip

    def sanitized(tool: str, limit: int, *words: str, alone: bool = False) -> Command:
        # Every tensor its own allocation, so that a read past its end is one past an allocation.
        uncached = {} if tool in ("racecheck", "synccheck") else UNCACHED
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
        command += [PYTHON, "-m", "tests.gpu.sanitized", *words]
        name = f"{tool}, every operator" if alone else tool
        return Command("sanitize", name, command, limit, uncached, alone)

    def compared(value: str, name: str) -> list[Command]:
        """AoMoA in Triton with and without what no GPU has run yet."""
        chosen = "(b1- or b8- or b32) and not stage1 and not compile and not dispatch"
        environment = {"SPECTRALX_BACKEND": "triton", "SPECTRALX_UNPROVEN": value}
        return [
            command
            for way, words in (("graphs", ("--graphs",)), ("hosted", ()))
            for command in (
                timed(f"{way} {name}", chosen, 45, *half, *words, "--seconds", "1", alone=True,
                      part="unproven", file=aomoa, environment=environment),
                Command("unproven", f"{way} {name} report",
                        [PYTHON, "-m", "benchmarks.report", str(SCRATCH / f"{way}-{name}.json"),
                         "--out", str(SCRATCH / name)], 5, alone=True),
            )
        ]  # fmt: skip

    half, both = ("--dtype", "bfloat16"), ("--dtype", "float32,bfloat16")
    step, aomoa = "benchmarks/bench_step.py", "benchmarks/bench_aomoa.py"
    # The float32 reference, at the batch that the aim names.
    steps = f"{STEPS} and not compile and (bfloat16 or (b32- and eager and not stage1))"
    found = [
        Command("build", "extension", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], 150,
                build),
        Command("tests", "gpu", [PYTHON, "-m", "pytest", *parallel, "-q", "-m", "gpu", "tests/gpu"],
                105 if whole else 300,
                {"OMP_NUM_THREADS": "1", "SPECTRALX_GPU_SECONDS": "95" if whole else "285"}),
        timed("graphs", f"({GRAPHED}) and not compile and not dispatch", 80 if whole else 160,
              *half, "--graphs", "--seconds", "1"),
        reported("bench", "graphs report", "graphs.json"),
        timed("compiled", "b8 and not dispatch", 45, *half, "--seconds", "1", file=aomoa),
        timed("steps", steps, 90 if whole else 120, *both, "--seconds", "2", file=step),
        timed("hosted", "(b1- or b32) and not stage1 and not compile", 45, *half, "--seconds", "1",
              file=aomoa, alone=True),
        *joined("bench"),
        timed("steps compiled", f"{STEPS} and bfloat16", 340, *half, "--seconds", "2", file=step,
              part="steps", alone=True),
        *joined("steps", alone=True),
        Command("sanitize", "planted", [PYTHON, "-m", "tests.gpu.planted"], 60, alone=True),
        sanitized("memcheck", 25),
        sanitized("racecheck", 25),
        Command("sanitize", "prepared",
                [PYTHON, "-m", "tests.gpu.sanitized", "--all", "--prepare", workers], 50,
                alone=True),
        sanitized("memcheck", 80, "--all", alone=True),
        sanitized("racecheck", 60, "--all", alone=True),
        sanitized("synccheck", 40, "--all", alone=True),
        sanitized("initcheck", 45, "--all", alone=True),
        Command("tune", "backends",
                [PYTHON, "-m", "benchmarks.tune", "--seconds", "330", "--prepare", "6",
                 "--out", str(out), *(["--plan", *plan] if plan else [])], 380, alone=True),
        Command("numerics", "drawn calls",
                [PYTHON, "-m", "tests.gpu.numerics", "--seconds", "150", "--limit", "340",
                 "--processes", str(max(min(os.cpu_count() or 1, 16) - 6, 1))], 360, alone=True),
        Command("unproven", "tests", [PYTHON, "-m", "pytest", *parallel, "-q", "-m", "gpu",
                "tests/gpu/test_aomoa.py"], 120,
                {"OMP_NUM_THREADS": "1", "SPECTRALX_UNPROVEN": "1"}, True),
        *compared("0", "proven"),
        *compared("1", "unproven"),
    ]  # fmt: skip
    return found


def _listen() -> None:
    """In a shell's background interrupts are ignored, by what is started there too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def execute(command: Command) -> Outcome:
    """Run a command, showing its output; interrupt, then kill all its processes when its time is
    over."""
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
            preexec_fn=_listen,
        )
    except OSError as error:
        lines, status = [str(error)], 127
        print(error)
        return _outcome(command, status, begin, lines)
    try:
        output, _ = process.communicate(timeout=command.limit)
        status_or_none: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
        try:
            output, _ = process.communicate(timeout=GRACE)
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


def merge(sources: Sequence[Path], target: Path, out: Path | None = None) -> int:
    """Join the rows of benchmark files, those that exist, into one; the number of rows. With `out`
    those of the same machine and commit that are there stay, but for what is measured anew."""
    contents = [json.loads(path.read_text()) for path in sources if path.exists()]
    if not contents:
        return 0
    facts = contents[0]["benchmarks"][0].get("extra_info", {})
    if out is not None:
        from benchmarks.report import machine_name

        kept = out / f"{machine_name(facts)}.json"
        before = json.loads(kept.read_text()) if kept.exists() else {"benchmarks": []}
        same = before["benchmarks"] and (
            before["benchmarks"][0]["extra_info"]["commit"] == facts["commit"]
        )
        contents = [before, *contents] if same else contents
    rows = {
        (row["group"], (row.get("params") or {}).get("impl")): row
        for content in contents
        for row in content["benchmarks"]
    }
    target.write_text(json.dumps({**contents[-1], "benchmarks": list(rows.values())}))
    return len(rows)


def write(outcomes: Sequence[Outcome], facts: Mapping[str, Any], name: str, out: Path) -> Path:
    """``<name>-gpu.json`` and ``.md`` under `out`; commands of the same commit that are not run
    anew stay."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-gpu.json"
    before = json.loads(path.read_text()) if path.exists() else {"facts": {}, "commands": []}
    if before["facts"].get("commit") == facts["commit"]:
        new = {(outcome.part, outcome.name) for outcome in outcomes}
        old = [Outcome(**command) for command in before["commands"]]
        outcomes = [*(each for each in old if (each.part, each.name) not in new), *outcomes]
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


def record_sanitizers(outcomes: Sequence[Outcome]) -> Path:
    """Row 18 of docs/RELIABILITY.md: the planted faults, and every operator under each tool."""
    from tests.harden import record

    found = [each for each in outcomes if each.name == "planted" or "every operator" in each.name]
    failures = [f"{each.name}: {each.verdict}" for each in found if not each.passed]
    whole = record.Outcome(len(found), failures)
    return record.append("gpu", 0, len(found), sum(each.seconds for each in found), whole)


def run_all(
    chosen: Sequence[Command], note: Callable[[list[Outcome]], object] = lambda _: None
) -> tuple[list[Outcome], int]:
    """Outcomes of all commands, and the exit status; a failure stops nothing but is named. `note`
    gets what is known after each command: the whole may be cut off."""
    outcomes: list[Outcome] = []
    for command in chosen:
        outcomes.append(execute(command))
        note(outcomes)
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
    parser.add_argument("--plan", nargs="+", default=(), metavar="DTYPE:BATCH", help="of tune")
    parser.add_argument("--built", action="store_true", help="take the extension that is there")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="NAME", help="commands to leave out"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    parser.add_argument("--merge", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.merge:
        sources = [SCRATCH / f"{name.replace(' ', '-')}.json" for name in ROWS]
        rows = merge(sources, SCRATCH / "bench.json", options.out)
        print(f"{rows} rows")
        return 0 if rows else 1
    chosen = [
        command
        for command in commands(options.out, options.plan, options.part)
        if (command.part in ("build", options.part) or (options.part is None and not command.alone))
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
    name = machine_name(facts)
    outcomes, status = run_all(chosen, lambda done: write(done, facts, name, options.out))
    print(f"wrote {write(outcomes, facts, name, options.out)} and .md")
    if options.part == "sanitize":
        print(f"wrote {record_sanitizers(outcomes)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
