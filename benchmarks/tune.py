"""Which backend is the fastest for every operator, and where the default is another one.

    python -m benchmarks.tune [--plan DTYPE:BATCH ...] [--seconds N] [--prepare N] [--out DIR]
                              [--device cuda|cpu] [--most N] [--without compile]

The calls are those that training steps of both stages make of every operator that has more than one
backend on the device, at ViT-L's widths and the batches of the plan, of each operator the `--most`
largest of a step. Each runs in every backend and, compiled, as the reference, is held against
float64 first (`benchmarks.harness`), and is timed as replays of a CUDA graph and with the host's
launches. After ``--seconds`` no further call is begun; what was measured is written after every
entry of the plan, to ``<device>-tune.md`` and ``.json``, where rows of earlier runs of the same
commit stay.

``--prepare`` processes compile everything beforehand, at once: Triton and torch.compile keep what
they have compiled on disk.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import ceilings, tuning
from benchmarks.calls import Call, of_step
from benchmarks.case import Setting
from benchmarks.conftest import DTYPES, machine_facts
from benchmarks.harness import Budget, checked, graphs_of, timed
from benchmarks.report import RESULTS, machine_name
from benchmarks.shapes import Shape, StepShape
from benchmarks.tuning import COMPILE, GRAPHS, HOSTED, Row
from spectralx_kernels import _backends

PLAN = ("bfloat16:32", "bfloat16:1", "float32:8", "float16:8", "bfloat16:8")
BUDGET = Budget(seconds=0.15, rounds=(5, 50))


def steps_of(batch: int) -> tuple[StepShape, ...]:
    """One step of stage 2 and one of each family of stage 1."""
    return (
        StepShape(name="stage2", family="scalemae", batch=batch, sensor="dfc"),
        StepShape(name="stage1-scalemae", family="scalemae", batch=batch, sensor="dfc"),
        StepShape(name="stage1-satmae++", family="satmae++", batch=batch, sensor="dfc"),
    )


def own_setting(call: Call, setting: Setting) -> Setting:
    """The setting in the dtype of the call's own numbers: losses stay in float32."""
    dtype = next((t.dtype for t in call.tensors if t.is_floating_point()), setting.dtype)
    return Setting(setting.device, dtype, rotate=False)


def backends_of(call: Call, setting: Setting) -> list[str]:
    """Backends that take the call, the device's first first."""
    dtype = own_setting(call, setting).dtype
    found = _backends.available(call.operator.name, setting.device, dtype)
    # Triton's interpreter is no backend to be timed.
    return [name for name in found if name != "triton" or setting.device == "cuda"]


def chosen(shape: StepShape, setting: Setting, most: int) -> list[Call]:
    """The calls of a step that have a choice of backends, of each operator the largest."""
    counts: dict[str, int] = {}
    found = []
    for call in of_step(shape, setting):
        name = call.operator.name
        if len(backends_of(call, setting)) > 1 and counts.get(name, 0) < most:
            counts[name] = counts.get(name, 0) + 1
            found.append(call)
    return found


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:200].replace("|", "/")


def row_of(call: Call, mode: str, setting: Setting, batch: int) -> Row:
    """A row without times."""
    return Row(
        operator=call.operator.name, call=call.name, batch=batch, mode=mode,
        dtype=str(own_setting(call, setting).dtype).removeprefix("torch."), default=call.default(),
        decided=tuning.place_of(call.operator.decider()),
    )  # fmt: skip


def measure(
    row: Row, call: Call, setting: Setting, bandwidth: float | None, names: Sequence[str]
) -> None:
    """Fill `row` with times of the implementations `names`, of accurate ones alone."""
    own = own_setting(call, setting)
    torch._dynamo.reset()
    found = checked(call.case(names), Shape(name=call.name), row.mode, own, names)
    row.refused = {n: _last_line(r.refused) for n, r in found.rows.items() if r.refused}
    if bandwidth is not None:
        row.copy = 1e3 * call.nbytes(row.mode) / bandwidth
    ways: dict[str, dict[str, Callable[[int], object]]] = {HOSTED: found.runs}
    if setting.device == "cuda":
        ways[GRAPHS], failed = graphs_of(found.runs)
        row.refused |= {f"{name}, {GRAPHS}": _last_line(why) for name, why in failed.items()}
    for way, runs in ways.items():
        samples = timed(runs, own, BUDGET) if runs else {}
        row.milliseconds[way] = {n: 1e3 * statistics.median(s) for n, s in samples.items()}


def passes_of(entry: str, setting: Setting, most: int) -> Iterator[tuple[Call, str]]:
    """The distinct calls of an entry of the plan, and their passes."""
    seen = set()
    for shape in steps_of(int(entry.split(":")[1])):
        for call in chosen(shape, setting, most):
            if call.key not in seen:
                seen.add(call.key)
                yield from ((call, mode) for mode in call.modes)
        gc.collect()


def prepare(arguments: Sequence[str], processes: int, seconds: float) -> None:
    """Compile in `processes` at once; what is not done by then is compiled when it is timed."""
    command = [sys.executable, "-m", "benchmarks.tune", *arguments]
    running = [
        subprocess.Popen([*command, "--share", f"{place}/{processes}"], stdout=subprocess.DEVNULL)
        for place in range(processes)
    ]
    end = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compile_only(call: Call, mode: str, setting: Setting, names: Sequence[str]) -> None:
    """Run the implementations, for what compilers keep. What fails here, for want of memory beside
    the other processes, say, fails aloud when it is timed."""
    try:
        checked(call.case(names), Shape(name=call.name), mode, setting, names)
    except Exception:
        traceback.print_exc()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--plan", nargs="+", default=PLAN, metavar="DTYPE:BATCH")
    parser.add_argument("--seconds", type=float, default=300.0, help="preparation included")
    parser.add_argument("--prepare", type=int, default=0, metavar="N", help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--most", type=int, default=2, help="calls of an operator in a step")
    parser.add_argument("--without", nargs="*", default=[], choices=[COMPILE])
    parser.add_argument("--share", help=argparse.SUPPRESS)  # "i/n": check that share, time nothing
    options = parser.parse_args(arguments)
    for entry in options.plan:
        dtype, _, batch = entry.partition(":")
        if dtype not in DTYPES or not batch.isdigit() or not int(batch):
            parser.error(f"--plan: got {entry}, expected as bfloat16:32")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("--device: got cuda, but torch sees no GPU", file=sys.stderr)
            return 2
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def setting_of(dtype: str) -> Setting:
        return Setting(options.device, DTYPES[dtype], rotate=False)

    end = time.monotonic() + options.seconds
    if options.prepare and not options.share:
        given = ["--plan", *options.plan, "--device", options.device, "--most", str(options.most)]
        given += ["--without", *options.without] if options.without else []
        prepare(given, options.prepare, options.seconds / 3)
    share, shares = (int(part) for part in (options.share or "0/1").split("/"))
    facts = machine_facts(options.device)
    if not options.share:
        facts["ceilings"] = ceilings.measure(options.device)
    rows: list[Row] = []
    left_out: list[str] = []
    for entry in options.plan:
        if time.monotonic() > end:
            left_out.append(f"{entry}, all of it")
            continue
        dtype, batch = entry.split(":")
        setting = setting_of(dtype)
        for place, (call, mode) in enumerate(passes_of(entry, setting, options.most)):
            if place % shares != share:
                continue
            if time.monotonic() > end:
                left_out.append(f"{entry} {call.name} {mode}")
                continue
            names = [*backends_of(call, setting), COMPILE]
            names = [name for name in names if name not in options.without]
            if options.share:
                compile_only(call, mode, own_setting(call, setting), names)
                continue
            row = row_of(call, mode, setting, int(batch))
            try:
                measure(row, call, setting, facts["ceilings"][ceilings.COPY], names)
            except Exception as error:  # the reference itself: too large, or the GPU is lost
                row.refused["all"] = _last_line(f"{type(error).__name__}: {error}")
            rows.append(row)
            print(f"{entry} {mode} {row.call}: {row.default}; {'; '.join(row.flags()) or 'ok'}",
                  flush=True)  # fmt: skip
            tuning.write(options.out, machine_name(facts), rows, facts)
    if options.share:
        return 0
    for each in left_out:
        print(f"not measured in the time: {each}")
    if not rows:
        return 1
    path = tuning.write(options.out, machine_name(facts), rows, facts)
    print(f"{len(rows)} rows, {len(left_out)} left out, "
          f"{sum(bool(row.flags()) for row in rows)} flagged; wrote {path} and .md")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
