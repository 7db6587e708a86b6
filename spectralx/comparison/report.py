"""The report of a comparison: tables of all methods, differences by seed, a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectralx import pictures
from spectralx.cli import write_text
from spectralx.comparison.methods import Method
from spectralx.comparison.runs import Plan, Run, finished
from spectralx.evaluation.page import Page
from spectralx.evaluation.results import POOLED, SOURCE, Figure
from spectralx.evaluation.tables import Table
from spectralx.metrics import Scores
from spectralx.settings import RunSettings

REPORT = "report"


@dataclass(frozen=True)
class Reached:
    """What one run reached.

    Attributes
    ----------
    run : which.
    miou : test set -> mIoU; "source", each target, and "target pooled" of several.
    trainable, decoder : parameters that train in stage 2, and those of them in the decoder.
    seconds : of all stages, reading, validation and test included.
    interrupted : whether a stage was, so that seconds are those of its last part at least.
    memory : peak, bytes; see ``memory_of``.
    memory_of : what the peak is of.
    device : that trained.
    """

    run: Run
    miou: dict[str, float]
    trainable: int
    decoder: int
    seconds: float
    interrupted: bool
    memory: int
    memory_of: str
    device: str

    @property
    def beside_decoder(self) -> int:
        """Trainable parameters that are not of the decoder."""
        return self.trainable - self.decoder

    @property
    def target(self) -> float:
        """mIoU on all targets together; on the source where there are none."""
        return self.miou[list(self.miou)[-1]]


def reached(plan: Plan) -> list[Reached]:
    """What the finished runs of `plan` reached, in the order of its methods and seeds."""
    found = []
    for method in plan.methods:
        for run in plan.runs:
            records = [finished(run, stage) for stage in plan.stages]
            if run.method == method and all(record is not None for record in records):
                found.append(_reached(run, [record for record in records if record]))
    return found


def _reached(run: Run, records: Sequence[dict[str, Any]]) -> Reached:
    last = records[-1]
    miou = {name: figures["miou"] for name, figures in last["tests"].items()}
    targets = [name for name in miou if name != SOURCE]
    if len(targets) > 1:
        pooled = sum(torch.tensor(last["matrices"][name]) for name in targets)
        assert isinstance(pooled, torch.Tensor)
        miou[POOLED] = Scores(pooled, last["class_names"]).miou
    return Reached(
        run,
        miou,
        last["trainable"],
        last["trainable_decoder"],
        sum(record["seconds"] for record in records),
        any(record["interrupted"] for record in records),
        max(record["peak_memory_bytes"] for record in records),
        last["peak_memory_of"],
        last["device"],
    )


def _by_method(results: Sequence[Reached]) -> dict[Method, list[Reached]]:
    groups: dict[Method, list[Reached]] = {}
    for one in results:
        groups.setdefault(one.run.method, []).append(one)
    return groups


def method_table(results: Sequence[Reached]) -> Table:
    """One row a method: mIoU of each test set, parameters, time and memory."""
    tests = list(results[0].miou)
    rows = []
    for method, group in _by_method(results).items():
        seconds = Figure(tuple(one.seconds for one in group)).mean
        at_least = "≥ " if any(one.interrupted for one in group) else ""
        memory = max(one.memory for one in group)
        rows.append(
            [
                method.title,
                str(len(group)),
                *(Figure(tuple(one.miou[test] for one in group)).percent() for test in tests),
                f"{group[0].trainable:,}",
                f"{group[0].beside_decoder:,}",
                f"{at_least}{seconds:.0f}",
                f"{memory / 2**20:,.0f}",
            ]
        )
    headings = ["method", "seeds", *(f"mIoU {test}" for test in tests), "trainable parameters"]
    headings += ["of them beside the decoder", "seconds", "peak memory, MiB"]
    first = results[0]
    caption = (
        "mIoU in percent at the labels' own size, mean ± standard deviation over seeds; seconds of "
        "a run, all stages with validation and test (≥: one was interrupted); memory: "
        f"{first.memory_of}; {first.device}."
    )
    return Table(headings, rows, caption)


def difference_table(results: Sequence[Reached]) -> Table | None:
    """How far the first method is ahead of each other one on the target, seed by seed."""
    groups = _by_method(results)
    first, *others = groups
    own = {one.run.seed: one.target for one in groups[first]}
    rows = []
    for method in others:
        theirs = {one.run.seed: one.target for one in groups[method]}
        seeds = sorted({*own} & {*theirs})
        if seeds:
            differences = [own[seed] - theirs[seed] for seed in seeds]
            ahead = sum(value > 0 for value in differences)
            rows.append(
                [
                    method.title,
                    Figure(tuple(differences)).percent(),
                    f"{ahead} of {len(seeds)}",
                    verdict(ahead, len(seeds)),
                ]
            )
    if not rows:
        return None
    headings = ["against", "points ahead, target mIoU", "seeds ahead", f"{first.title} is"]
    return Table(headings, rows, f"{first.title} less each method, both with the same seed.")


def verdict(ahead: int, seeds: int) -> str:
    """What so many seeds ahead say."""
    if seeds < 2:
        return "not told apart (one seed)"
    return "ahead" if ahead == seeds else "behind" if ahead == 0 else "not told apart"


def conditions(plan: Plan) -> list[str]:
    """What all methods share, a sentence each."""
    settings = plan.settings

    def length(name: str, run: RunSettings) -> str:
        return f"{name.replace('stage', 'stage ')}: {run.steps:,} steps of {run.batch_size} images"

    parts = {"stage1": settings.stage1.run, "stage2": settings.stage2.run}
    budget = "; ".join(length(stage, parts[stage]) for stage in plan.stages)
    if plan.pretrain:
        start = (
            f"all start from one backbone, trained here for {plan.pretrain:,} steps to reconstruct "
            "the source's training images in red, green and blue: a stand-in for an optical "
            "foundation model. 'frozen' keeps its blocks and its patch convolution, made to "
            "fit the bands by wavelength"
        )
    elif settings.model.backbone_weights is not None:
        start = f"all start from the weights in {settings.model.backbone_weights}"
    else:
        start = (
            "no weights to start from: what is frozen is frozen at its random start, so 'frozen' "
            "is a decoder on random features"
        )
    return [
        f"task {settings.data.task}; the best checkpoint is chosen on "
        + ("the target" if settings.data.official else "the source's validation images"),
        f"the same for every method: {budget}",
        start,
        *(f"{method.title} trains in stage 2: {method.trains}" for method in plan.methods),
    ]


def runs_csv(results: Sequence[Reached]) -> str:
    """One row a run; mIoU as shares of 1."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    tests = list(results[0].miou)
    headings = ["trainable", "trainable_beside_decoder", "seconds", "peak_memory_bytes"]
    rows.writerow(["method", "seed", *(f"miou {test}" for test in tests), *headings])
    for one in results:
        rows.writerow(
            [
                one.run.method.name,
                one.run.seed,
                *(f"{one.miou[test]:.6f}" for test in tests),
                one.trainable,
                one.beside_decoder,
                f"{one.seconds:.1f}",
                one.memory,
            ]
        )
    return text.getvalue()


def write_report(plan: Plan) -> str:
    """Write ``report.html``, ``.md``, ``.csv``, ``.json`` and ``.png`` of the finished runs.

    Returns
    -------
    The tables, for the terminal.
    """
    results = reached(plan)
    if not results:
        return "no run is finished yet"
    tables = [method_table(results)]
    differences = difference_table(results)
    if differences is not None:
        tables.append(differences)
    total = len(plan.runs)
    notes = conditions(plan)
    if len(results) < total:
        notes.insert(0, f"unfinished: {len(results)} of {total} runs")
    groups = _by_method(results)
    picture = plan.folder / f"{REPORT}.png"
    pictures.comparison(
        picture,
        {method.title: [100 * one.target for one in group] for method, group in groups.items()},
        {method.title: group[0].beside_decoder for method, group in groups.items()},
        f"target mIoU (%), task {plan.settings.data.task}",
    )
    page = Page("Comparison of methods")
    page.items(notes)
    for table in tables:
        page.table(table)
    page.picture(
        picture,
        "Left: a point a seed, a bar the mean. Right: means over what trains beside the decoder.",
    )
    markdown = ["# Comparison of methods", "".join(f"- {note}\n" for note in notes)]
    markdown += [table.markdown() for table in tables]
    figures = {
        **plan.held(),
        "runs": [
            {"method": one.run.method.name, "seed": one.run.seed, "miou": one.miou}
            | {"trainable": one.trainable, "seconds": one.seconds, "peak_memory": one.memory}
            for one in results
        ],
    }
    write_text(plan.folder / f"{REPORT}.html", page.html())
    write_text(plan.folder / f"{REPORT}.md", "\n\n".join(part.strip() for part in markdown) + "\n")
    write_text(plan.folder / f"{REPORT}.csv", runs_csv(results))
    write_text(plan.folder / f"{REPORT}.json", json.dumps(figures, indent=1) + "\n")
    return "\n\n".join(table.plain() for table in tables)
