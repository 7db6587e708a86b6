"""The report of an evaluation: HTML, Markdown, JSON, CSV and pictures in one folder."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from spectralx import pictures
from spectralx.cli import write_text
from spectralx.evaluation import published
from spectralx.evaluation.page import Page
from spectralx.evaluation.results import (
    OVERALL,
    PER_CLASS,
    SIZES,
    TaskResult,
)
from spectralx.evaluation.scoring import file_name
from spectralx.evaluation.tables import Table
from spectralx_kernels import __version__

RESULTS = "results.json"


def summary_table(results: Sequence[TaskResult]) -> Table:
    """One row a task and test set: main figures at both sizes, published ones beside them."""
    headings = ["task", "test set", "seeds"]
    headings += ["mIoU, native size", "mIoU, model's size"]
    headings += [title for name, title in OVERALL.items() if name != "miou"]
    headings += ["published mIoU"]
    rows = []
    for result in results:
        main = result.headline
        for test in result.tests:
            beside = published.published(result.task) if test == result.main_test else ""
            rows.append(
                [
                    result.task,
                    test,
                    str(len(result.seeds)),
                    result.figure("native", test, "miou").percent(),
                    result.figure("model", test, "miou").percent(),
                    *(
                        result.figure(main, test, name).percent()
                        for name in OVERALL
                        if name != "miou"
                    ),
                    beside,
                ]
            )
    caption = (
        "Percent; mean ± standard deviation over seeds. Published: on the real data set, "
        f"{published.SOURCE}."
    )
    return Table(headings, rows, caption)


def class_table(result: TaskResult, name: str = "iou") -> Table:
    """One row a class, then the overall figures; both sizes of each test set side by side."""
    columns = [(test, size) for test in result.tests for size in SIZES]
    figures = [result.class_figures(size, test, name) for test, size in columns]
    rows = [
        [class_name, *(of_classes[index].percent() for of_classes in figures)]
        for index, class_name in enumerate(result.class_names)
        if index > 0
    ]
    rows += [
        [title, *(result.figure(size, test, key).percent() for test, size in columns)]
        for key, title in OVERALL.items()
    ]
    short = {"native": "native", "model": result.size_name("model")}
    headings = ["class", *(f"{test}, {short[size]}" for test, size in columns)]
    return Table(headings, rows, f"{PER_CLASS[name]} of each class, percent.")


def rules(result: TaskResult) -> list[str]:
    """What was done to get the figures of a task, a sentence each."""
    official = result.protocol == "official"
    lines = [
        "averages: "
        + (
            "over the classes that occur in the truth; pixels predicted as unlabelled are left out "
            "(published protocol)"
            if official
            else "over the classes that occur in the truth or in the prediction; predicting "
            "unlabelled is a miss"
        ),
        f"sizes: {result.size_name('native')}, and {result.size_name('model')} with labels resized "
        f"to it; overall accuracy, F1 and kappa in the summary are at {_main(result)}",
        "checkpoints: "
        + ("chosen on the target domain" if result.selected_on_target else "chosen on the source"),
    ]
    if official != result.selected_on_target:
        lines.append(
            "not the published protocol whole: it also chooses the checkpoint on the target domain"
            if official
            else "trained under the published protocol (data.official), scored by other rules"
        )
    if official:
        lines.append(
            "the published protocol adds up its confusion matrix over all validations of a "
            "training; here each checkpoint is scored once"
        )
    if result.trained_on != result.task:
        lines.append(f"trained on task {result.trained_on}, not on this one")
    for test, files in result.skipped.items():
        lines.append(f"{test}: {len(files)} damaged files left out, as was asked")
        lines += [f"left out of {test}: {error}" for error in files.values()]
    lines += [
        f"seed {seed.seed}: {seed.checkpoint}"
        + (f", step {seed.step:,}" if seed.step is not None else "")
        for seed in result.seeds
    ]
    return lines


def _main(result: TaskResult) -> str:
    return result.size_name(result.headline)


def classes_csv(results: Sequence[TaskResult]) -> str:
    """All figures of all classes, seeds, sizes and test sets: one row each, shares of 1."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["task", "test set", "size", "seed", "class", *PER_CLASS, "pixels"])
    for result in results:
        for size in SIZES:
            for test in result.tests:
                for seed, scores in zip(result.seeds, result.scores(size, test), strict=True):
                    columns = [getattr(scores, name).tolist() for name in PER_CLASS]
                    pixels = scores.matrix.sum(1).tolist()
                    for index, name in enumerate(result.class_names[1:], start=1):
                        values = [
                            "" if column[index] != column[index] else f"{column[index]:.6f}"
                            for column in columns
                        ]
                        rows.writerow(
                            [result.task, test, size, seed.seed, name, *values, pixels[index]]
                        )
    return text.getvalue()


def confusion_csv(matrix: torch.Tensor, class_names: Sequence[str]) -> str:
    """A confusion matrix with names: rows are the truth, columns the prediction, in pixels."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["truth \\ prediction", *class_names])
    for name, counts in zip(class_names, matrix.tolist(), strict=True):
        rows.writerow([name, *counts])
    return text.getvalue()


def _write_confusion(result: TaskResult, folder: Path) -> dict[str, Path]:
    """Pictures (over all seeds) and tables (of each seed); the pictures of the main size."""
    shown: dict[str, Path] = {}
    for size in SIZES:
        for test in result.tests:
            stem = f"{file_name(test)}-{size}"
            matrices = [result.matrix(size, test, seed) for seed in result.seeds]
            for seed, matrix in zip(result.seeds, matrices, strict=True):
                write_text(
                    folder / f"{stem}-seed{seed.seed}.csv",
                    confusion_csv(matrix, result.class_names),
                )
            picture = folder / f"{stem}.png"
            pictures.confusion(
                picture,
                torch.stack(matrices).sum(0),
                result.class_names,
                f"{result.task}, {test}, {result.size_name(size)}",
            )
            if size == result.headline:
                shown[test] = picture
    return shown


def write_report(results: Sequence[TaskResult], folder: Path) -> None:
    """Write everything about `results` into `folder`.

    ``report.html`` (self-contained), ``report.md``, ``results.json``, ``classes.csv`` and, for
    each task, a folder with confusion matrices. Pictures of predictions that are there already,
    ``<task>/<test set>.png``, are shown.
    """
    summary = summary_table(results)
    page = Page("Evaluation")
    page.text(
        f"SpectralX {__version__}, PyTorch {torch.__version__}, Python "
        f"{platform.python_version()}. Published figures follow the rules of the published "
        "protocol."
    )
    page.table(summary)
    markdown = ["# Evaluation", summary.markdown()]
    for result in results:
        own = folder / file_name(result.task)
        confusion = _write_confusion(result, own / "confusion")
        page.heading(f"{result.task}: {result.model}")
        page.items(rules(result))
        markdown += [
            f"## {result.task}: {result.model}",
            "".join(f"- {x}\n" for x in rules(result)),
        ]
        table = class_table(result)
        page.table(table)
        markdown.append(table.markdown())
        for test, picture in confusion.items():
            page.heading(f"{result.task}, {test}", 3)
            page.picture(picture, f"Confusion at {_main(result)}, all seeds together.")
            predictions = own / f"{file_name(test)}.png"
            if predictions.is_file():
                page.picture(predictions, f"First images, seed {result.seeds[0].seed}.")
    figures = {
        "version": __version__,
        "torch": torch.__version__,
        "published": {"source": published.SOURCE, "figures": _published(results)},
        "tasks": [result.as_dict() for result in results],
    }
    write_text(folder / "report.html", page.html())
    write_text(folder / "report.md", "\n\n".join(part.strip() for part in markdown) + "\n")
    write_text(folder / "classes.csv", classes_csv(results))
    write_text(folder / RESULTS, json.dumps(figures, indent=1) + "\n")


def _published(results: Sequence[TaskResult]) -> dict[str, list[dict[str, object]]]:
    return {
        result.task: [
            {"method": figure.method, "miou": figure.miou / 100}
            for figure in published.FIGURES.get(result.task, ())
        ]
        for result in results
    }
