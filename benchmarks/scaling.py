"""How the time of the adapted layer grows with tokens, experts and rank.

    python -m benchmarks.scaling [--device cpu|cuda] [--dtype float32] [--full] [--out DIR]
                                 [--layer fc1|fc2] [--axis tokens|experts|rank] [--seconds S]

On the layers of the paper (fc1 1024 to 4096, fc2 4096 to 1024; rank d/4, hidden d/32, 2 of 4
experts, 2 x 197 tokens where they are not what is varied), one quantity at a time. All sizes of a
group are timed in turns in one process. Sizes of at most 4 x 197 tokens are first held against the
reference in float64; one that disagrees ends the run with status 1 and no numbers.

For each size it prints

- `work`: multiply-adds that no implementation avoids (the frozen product, down, up, router, and the
  `top_k` experts a token takes), relative to the first size;
- `time`: relative to the first size;
- `time/work`: at most 1 where time grows no faster than that work. It falls below 1 where a fixed
  cost is spread over more;
- `line`: how far the time lies from the straight line fixed + slope * size that fits all sizes
  best (in relative terms). The line's fixed part is the work that does not depend on what is
  varied: linear growth means that the time is on this line, not that it is proportional.

With the number of experts the work hardly grows, as a token takes two whatever there are; what an
expert more costs is the `slope`, in microseconds, with its share of the first size's time.

``--out DIR`` writes ``<machine>-scaling.json`` and ``.md`` there; groups measured before and not
now are kept, each with its own commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import floors
from benchmarks.accuracy import compare
from benchmarks.bench_aomoa import build
from benchmarks.case import Runner, Setting
from benchmarks.clock import interleave, stopwatch_for
from benchmarks.conftest import DTYPES, machine_facts
from benchmarks.report import as_markdown, as_text, machine_name
from benchmarks.shapes import FORWARD, MLP_WIDTH, TOKENS, TRAINING, WIDTH, AomoaShape

IMAGE = TOKENS + 1  # tokens of an image: the patches and the class token
CHECKED = 4 * IMAGE
LAYERS = {"fc1": (WIDTH, MLP_WIDTH), "fc2": (MLP_WIDTH, WIDTH)}
AXES = ("tokens", "experts", "rank")
IMAGES = {False: (1, 2, 4, 8, 16), True: (1, 2, 4, 8, 16, 32, 64)}
EXPERTS = (2, 4, 8, 16, 32, 64)
RANK_DIVISORS = (16, 8, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class RankedShape(AomoaShape):
    """An adapted layer of any rank; the hidden width stays that of the paper."""

    own_rank: int

    @property
    def rank(self) -> int:
        return self.own_rank


@dataclass(frozen=True)
class Growth:
    """The sizes of one group and what was found: medians in ms, work in multiply-adds."""

    group: str
    axis: str
    sizes: list[int]
    medians: list[float]
    work: list[int]
    facts: Mapping[str, Any]

    def line(self) -> tuple[float, float]:
        """Fixed part and slope of the line with the least squared relative residuals, in ms."""
        weights = [1 / median**2 for median in self.medians]
        total = sum(weights)
        x0 = sum(w * x for w, x in zip(weights, self.sizes, strict=True)) / total
        y0 = sum(w * y for w, y in zip(weights, self.medians, strict=True)) / total
        pairs = list(zip(weights, self.sizes, self.medians, strict=True))
        slope = sum(w * (x - x0) * (y - y0) for w, x, y in pairs)
        slope /= sum(w * (x - x0) ** 2 for w, x, _ in pairs)
        return y0 - slope * x0, slope

    def deviations(self) -> list[float]:
        """Distance of each median from the line, relative to the line."""
        fixed, slope = self.line()
        return [
            median / (fixed + slope * size) - 1
            for size, median in zip(self.sizes, self.medians, strict=True)
        ]

    def over_work(self) -> list[float]:
        """Growth of time over growth of work, both from the first size."""
        return [
            median / self.medians[0] / (work / self.work[0])
            for median, work in zip(self.medians, self.work, strict=True)
        ]

    def table(self) -> list[list[str]]:
        rows = [[self.axis, "ms", "work", "time", "time/work", "line"]]
        columns = zip(
            self.sizes, self.medians, self.work, self.over_work(), self.deviations(), strict=True
        )
        for size, median, work, ratio, deviation in columns:
            relative = (work / self.work[0], median / self.medians[0], ratio)
            numbers = [f"{value:.3g}" for value in (median, *relative)]
            rows.append([str(size), *numbers, f"{deviation:+.1%}"])
        return rows

    def summary(self) -> str:
        """One line: fixed part, slope, and the two measures of growth."""
        fixed, slope = self.line()
        return (
            f"fixed {fixed:.3g} ms, slope {1e3 * slope:.3g} us a unit of {self.axis} "
            f"({slope / self.medians[0]:.2%} of the first size); time/work at most "
            f"{max(self.over_work()):.2f}; off the line by at most "
            f"{max(map(abs, self.deviations())):.1%}"
        )


def shapes(layer: str, axis: str, full: bool) -> tuple[list[int], list[AomoaShape]]:
    """Sizes along `axis`, and the shapes that have them."""
    width, out = LAYERS[layer]
    base = AomoaShape(name=layer, tokens=2 * IMAGE, in_features=width, out_features=out)
    if axis == "tokens":
        sizes = [images * IMAGE for images in IMAGES[full]]
        return sizes, [replace(base, tokens=tokens) for tokens in sizes]
    if axis == "experts":
        return list(EXPERTS), [replace(base, experts=experts) for experts in EXPERTS]
    sizes = [width // base.attributes // divisor for divisor in RANK_DIVISORS]
    fields = {key: value for key, value in asdict(base).items() if key != "name"}
    return sizes, [RankedShape(name=layer, own_rank=rank, **fields) for rank in sizes]


def work_of(shape: AomoaShape, mode: str) -> int:
    """Multiply-adds of `benchmarks.floors` and of the router (with its noise in training)."""
    rows = shape.tokens * shape.attributes
    router = [floors.Product(rows, shape.rank, shape.experts, count=1 if mode == FORWARD else 2)]
    if mode != FORWARD:
        router = floors.trained(router)
    return sum(product.operations for product in floors.aomoa(shape, mode) + router) // 2


def disagreements(shape: AomoaShape, mode: str, setting: Setting) -> list[str]:
    """What the fused layer gets wrong at this shape, against the reference in float64."""
    case, exact_setting = build(shape, mode, setting), setting.exact()
    exact_case = build(shape, mode, exact_setting)
    exact_runner = Runner(exact_case, mode, exact_setting)
    exact = exact_runner.results(exact_case.functions["eager"])
    runner = Runner(case, mode, setting)
    runner.upstream = tuple(grad.to(setting.dtype) for grad in exact_runner.upstream)
    plain = runner.results(case.functions["eager"])
    found = runner.results(case.functions["fused"])
    compared = compare(found, plain, exact, setting.dtype)
    return [str(comparison) for comparison in compared if not comparison.holds]


def grow(
    layer: str, axis: str, mode: str, setting: Setting, *, full: bool, seconds: float
) -> Growth:
    """One group, measured. Raises AssertionError where the layer disagrees with the reference."""
    name = f"aomoa/{layer}/{mode}/{str(setting.dtype).removeprefix('torch.')}/{axis}"
    sizes, made = shapes(layer, axis, full)
    for size, shape in zip(sizes, made, strict=True):
        if shape.tokens <= CHECKED:
            wrong = disagreements(shape, mode, replace(setting, rotate=False))
            assert not wrong, f"{name} at {size}: {'; '.join(wrong)}"
    runs: dict[str, Callable[[int], object]] = {}
    for size, shape in zip(sizes, made, strict=True):
        case = build(shape, mode, setting)
        runs[str(size)] = partial(Runner(case, mode, setting), case.functions["fused"])
    watch = stopwatch_for(setting.device)
    samples = interleave(runs, watch, seconds=seconds, rounds=(5, 100), warm_up=watch.warm_up)
    return Growth(
        name,
        axis,
        sizes,
        [1e3 * statistics.median(samples[str(size)]) for size in sizes],
        [work_of(shape, mode) for shape in made],
        {**machine_facts(setting.device), "rounds": len(next(iter(samples.values())))},
    )


def document(groups: Sequence[Growth]) -> str:
    """The Markdown page."""
    assert __doc__ is not None
    facts = groups[-1].facts
    lines = [f"# How the adapted layer grows: {facts['device']}", ""]
    explained = __doc__[__doc__.index("For each size") : __doc__.index("``--out")].strip()
    lines += ["`python -m benchmarks.scaling`. " + explained, ""]
    for group in groups:
        about = ", ".join(f"{key} {group.facts[key]}" for key in ("threads", "torch", "commit"))
        lines += [f"## {group.group}", "", as_markdown(group.table()), ""]
        lines += [f"{group.summary()}. {about}.", ""]
    return "\n".join(lines)


def write(groups: Sequence[Growth], folder: Path) -> Path:
    """JSON and Markdown under `folder`; groups of the file that were not measured now stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine_name(groups[0].facts)}-scaling.json"
    kept = [Growth(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    merged = {group.group: group for group in [*kept, *groups]}
    ordered = [merged[name] for name in sorted(merged)]
    path.write_text(json.dumps([asdict(group) for group in ordered], indent=1) + "\n")
    path.with_suffix(".md").write_text(document(ordered))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--full", action="store_true", help="up to 64 x 197 tokens")
    parser.add_argument("--layer", choices=list(LAYERS), help="default: both")
    parser.add_argument("--axis", choices=AXES, help="default: all")
    parser.add_argument("--pass", dest="mode", choices=(FORWARD, TRAINING), help="default: both")
    parser.add_argument("--seconds", type=float, default=4.0, help="for a group (default: 4)")
    parser.add_argument("--out", type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("--device: got cuda, but torch sees no GPU", file=sys.stderr)
            return 2
        torch.backends.cuda.matmul.allow_tf32 = False
    setting = Setting(options.device, DTYPES[options.dtype])
    groups = []
    for layer in [options.layer] if options.layer else LAYERS:
        for axis in [options.axis] if options.axis else AXES:
            for mode in [options.mode] if options.mode else (FORWARD, TRAINING):
                try:
                    group = grow(
                        layer, axis, mode, setting, full=options.full, seconds=options.seconds
                    )
                except AssertionError as wrong:
                    print(wrong, file=sys.stderr)
                    return 1
                print(f"\n{group.group}\n{as_text(group.table())}\n{group.summary()}", flush=True)
                groups.append(group)
    if options.out is not None:
        print(f"wrote {write(groups, options.out)} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
