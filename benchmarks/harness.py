"""Runs a group: builds its case, checks every implementation, then times all of them in turns."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.accuracy import by_part, compare
from benchmarks.case import Case, Runner, Setting
from benchmarks.clock import Stopwatch, interleave, stopwatch_for
from benchmarks.memory import SavedBytes, keep_freed_memory, peak_bytes
from benchmarks.shapes import FORWARD, STEP, Shape

# Not capturable, or not to be captured twice.
UNCAPTURED = ("dispatch", "compile")

Build = Callable[[Any, str, Setting], Case]


class GroupKey(NamedTuple):
    """``<op>/<shape>/<pass>/<dtype>``."""

    op: str
    shape: str
    mode: str
    dtype: str

    def __str__(self) -> str:
        return "/".join(self)


@dataclass
class Row:
    """One implementation of a group: its samples in seconds and facts, or why there are none."""

    samples: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Budget:
    """How long to measure a group, and its least and most rounds."""

    seconds: float = 2.0
    rounds: tuple[int, int] = (3, 100)


@dataclass
class Checked:
    """A group whose implementations have been held against the reference.

    Attributes
    ----------
    rows : of every wanted implementation; those that were refused say why.
    runs : name -> function of the turn, of those that agreed, and of the floor's candidates.
    """

    case: Case
    rows: dict[str, Row]
    runs: dict[str, Callable[[int], object]]


class InaccurateError(AssertionError):
    """An implementation disagrees with the reference: it gets no number."""


def measure(
    build: Build,
    shape: Shape,
    mode: str,
    setting: Setting,
    names: Sequence[str],
    budget: Budget,
    stopwatch: Stopwatch | None = None,
    graphs: bool = False,
) -> dict[str, Row]:
    """Rows of the implementations `names` of one group.

    An implementation that disagrees with the reference, or raises, is refused: its row has the
    reason and no samples, and the others are measured without it. With `graphs`, replays of a CUDA
    graph of the first input set are timed, but for what waits for the host (`dispatch`) and for
    steps; L2 is flushed all the same.
    """
    found = checked(build, shape, mode, setting, names)
    runs, rows = found.runs, found.rows
    if "floor" in names:
        floor = found.case.floor()
        runs.update({f"floor {part}": _ignore_turn(run) for part, run in floor.items()})
        if found.case.linear is not None:
            alone = Runner(replace(found.case, parameters={}), mode, setting)
            runs["linear"] = partial(alone, found.case.linear)
    if graphs and mode != STEP:
        whole = {name: run for name, run in runs.items() if name in UNCAPTURED}
        replays, failed = graphs_of({n: run for n, run in runs.items() if n not in whole})
        runs = {name: whole.get(name) or replays[name] for name in runs if name not in failed}
        for name in failed.keys() & rows.keys():
            rows[name].refused = failed[name]
    samples = timed(runs, setting, budget, stopwatch)
    for name, row in rows.items():
        row.samples = samples.get(name, [])
    if "floor" in names:
        rows["floor"] = _floor_row(samples)
        rows["floor"].facts |= {
            name: getattr(floor, name) for name in ("operations", "nbytes") if hasattr(floor, name)
        }
    return rows


def checked(build: Build, shape: Any, mode: str, setting: Setting, names: Sequence[str]) -> Checked:
    """The implementations `names` of one group, held against the reference, with their memory."""
    case = build(shape, mode, setting)
    runner = Runner(case, mode, setting)
    rows = {name: Row() for name in names}
    functions = {name: case.functions[name] for name in names if name in case.functions}
    if "compile" in names and "compile" not in functions:
        functions["compile"] = torch.compile(case.functions["eager"], fullgraph=True, dynamic=False)
    _check(rows, functions, runner, build, shape, setting)
    gc.collect()
    runs: dict[str, Callable[[int], object]] = {
        name: partial(runner, function)
        for name, function in functions.items()
        if not rows[name].refused
    }
    return Checked(case, rows, runs)


def timed(
    runs: dict[str, Callable[[int], object]],
    setting: Setting,
    budget: Budget,
    stopwatch: Stopwatch | None = None,
) -> dict[str, list[float]]:
    """Samples of `runs`, taken in turns, on memory that the process has already."""
    keep_freed_memory()
    watch = stopwatch or stopwatch_for(setting.device)
    return interleave(
        runs, watch, seconds=budget.seconds, rounds=budget.rounds, warm_up=watch.warm_up
    )


def captured(run: Callable[[int], object]) -> Callable[[int], object]:
    """``run(0)`` as a CUDA graph that every call replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(0)

    def replay(turn: int, run: object = run, outputs: object = outputs) -> None:
        graph.replay()  # what was captured, and its outputs, live as long as this function

    return replay


def graphs_of(
    runs: Mapping[str, Callable[[int], object]],
) -> tuple[dict[str, Callable[[int], object]], dict[str, str]]:
    """`captured` of each, and why not, by name."""
    replays, failed = {}, {}
    for name, run in runs.items():
        try:
            replays[name] = captured(run)
        except RuntimeError:  # one implementation's failure is its own row's
            failed[name] = traceback.format_exc()
    return replays, failed


def _ignore_turn(run: Callable[[], object]) -> Callable[[int], object]:
    return lambda turn: run()


def _check(
    rows: dict[str, Row],
    functions: dict[str, Callable[..., Any]],
    runner: Runner,
    build: Build,
    shape: Shape,
    setting: Setting,
) -> None:
    """Accuracy and memory of `functions`, into `rows`; ``eager`` is always run, as the measure."""
    case = runner.case
    exact = None
    if case.truth != setting.dtype:
        exact_setting = setting.exact(case.truth)
        exact_case = build(shape, runner.mode, exact_setting)
        exact_runner = Runner(exact_case, runner.mode, exact_setting)
        exact = exact_runner.results(exact_case.functions["eager"])
        # Made here already, so that no implementation's peak counts it.
        runner.upstream = tuple(grad.to(setting.dtype) for grad in exact_runner.upstream)
        del exact_case, exact_runner
    eager = Row()
    plain = _probe(eager, "eager", case.functions["eager"], runner, setting)
    if "eager" in rows:
        rows["eager"] = eager
    exact = plain if exact is None else exact
    if case.by_part:
        same, plain = exact is plain, by_part(plain)
        exact = plain if same else by_part(exact)
    for name, row in rows.items():
        if name not in functions:
            continue
        try:
            found = plain
            if name != "eager":
                found = _probe(row, name, functions[name], runner, setting)
                found = by_part(found) if case.by_part else found
            compared = compare(found, plain, exact, setting.dtype)
            wrong = [str(comparison) for comparison in compared if not comparison.holds]
            if wrong:
                raise InaccurateError("; ".join(wrong))
            row.facts["error"] = max(comparison.error for comparison in compared)
        except Exception:  # one implementation's failure is its own row's
            row.refused = traceback.format_exc()


def _probe(
    row: Row, name: str, function: Callable[..., Any], runner: Runner, setting: Setting
) -> dict[str, Tensor]:
    """Results of the first input set, with the memory it took noted in `row`."""
    case = runner.case
    found: dict[str, Tensor] = {}
    saved = SavedBytes([*case.inputs[0], *case.parameters.values(), *case.constants])

    def run() -> None:
        found.update(runner.results(function, saved))

    if name == "compile" or setting.device == "cuda":
        # The first call compiles, tunes and sets up libraries: not to be counted.
        begin = time.perf_counter()
        run()
        if name == "compile":
            row.facts["compile_s"] = round(time.perf_counter() - begin, 2)
        found.clear()
        saved = SavedBytes([*case.inputs[0], *case.parameters.values(), *case.constants])
    row.facts["peak_bytes"] = peak_bytes(run, setting.device)
    if runner.mode != FORWARD:
        row.facts["saved_bytes"] = saved.bytes
    return found


def _floor_row(samples: dict[str, list[float]]) -> Row:
    """The slowest candidate, with the others' medians and the linear layer's as facts."""
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    candidates = [name for name in samples if name.startswith("floor ")]
    slowest = max(candidates, key=lambda name: medians[name])
    facts: dict[str, Any] = {
        f"{name.removeprefix('floor ')}_ms": medians[name] * 1e3 for name in candidates
    }
    facts["floor"] = slowest.removeprefix("floor ")
    if "linear" in samples:
        facts["linear_ms"] = medians["linear"] * 1e3
    return Row(samples[slowest], facts)
