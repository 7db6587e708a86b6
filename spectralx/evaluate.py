"""Score checkpoints on the tests of tasks; a command: ``python -m spectralx.evaluate``.

    python -m spectralx.evaluate --checkpoint runs/seed0 runs/seed1 --out report
    python -m spectralx.evaluate --checkpoint runs --task all --root whu-ohs=DIR dfc2020=DIR ...

Several checkpoints of one experiment are its seeds: figures are means and deviations over them.
Each is scored at the labels' own size and at the size the model sees, on each target domain and on
all of them together. The report is one HTML page that needs nothing else, and the same as
Markdown, JSON, CSV and PNG.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser

from spectralx.cli import InputError, run_command, write_folder
from spectralx.evaluation.report import (
    RESULTS,
    class_table,
    summary_table,
    write_report,
)
from spectralx.evaluation.results import TaskResult
from spectralx.evaluation.scoring import (
    Evaluation,
    file_name,
    reconstruction_errors,
    run_tests,
    segmentation_scores,
)
from spectralx.evaluation.trained import (
    GAP_TASKS,
    Trained,
    by_task,
    find_checkpoints,
    roots_by_task,
    score_task,
)
from spectralx.metrics import Protocol
from spectralx.options import parse
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation

__all__ = [
    "GAP_TASKS",
    "Evaluation",
    "TaskResult",
    "evaluate",
    "evaluate_tasks",
    "main",
    "reconstruction_errors",
    "run_tests",
    "segmentation_scores",
]


def evaluate(
    checkpoint: str | Path,
    *,
    root: str | None = None,
    task: str | None = None,
    batch_size: int = 16,
    device: str | None = None,
    pictures_to: str | Path | None = None,
) -> Evaluation:
    """Score one checkpoint of either stage as its training did.

    Parameters
    ----------
    checkpoint : its folder.
    root, task : data other than the checkpoint was trained on; the same layout and classes.
    batch_size : images at a time.
    device : "cpu", "cuda", ...; the GPU where there is one by default.
    pictures_to : folder for pictures of the first images of each test set.

    Raises
    ------
    ValueError : a checkpoint or data that cannot be used, or that do not fit each other.
    """
    trained = Trained.read(checkpoint)
    data = trained.data(root=root, task=task, batch_size=batch_size)
    model = trained.model(device)
    assert isinstance(model, (Segmentation, MaskedReconstruction))
    folder = None if pictures_to is None else Path(pictures_to)
    return run_tests(model, data, official=trained.settings.data.official, pictures_to=folder)


def evaluate_tasks(
    paths: Sequence[str | Path],
    *,
    task: str | None = None,
    roots: Sequence[str] = (),
    protocol: Protocol = "proper",
    batch_size: int = 16,
    device: str | None = None,
    pictures_to: Path | None = None,
    count: int = 3,
    skip_damaged: bool = False,
    progress: bool = True,
) -> list[TaskResult]:
    """Score checkpoints of stage 2 on one task or several.

    Parameters
    ----------
    paths : folders of checkpoints, or above ``stage2/best`` of experiments.
    task : a task for all of them; by default the one each was trained on; "all" for the same, and
        each of the eight with a domain gap must be there.
    roots : folder of the data, or ``DATASET=DIR`` (whu-ohs, dfc2020, mts12) each; by default where
        training found them.
    protocol : "proper", or "official" for the published protocol's labels and averages.
    batch_size, device : of the model.
    pictures_to : folder for pictures of the first `count` images, in a folder a task.
    skip_damaged : leave files that cannot be read out of the tests; results and report name them.
    progress : show progress bars on stderr.

    Returns
    -------
    One result a task, in the order of `spectralx.data.task_names`.

    Raises
    ------
    ValueError : checkpoints or data that cannot be used, or that do not fit each other.
    """
    groups = by_task([Trained.read(path) for path in find_checkpoints(paths)], task)
    places = roots_by_task(roots)
    return [
        score_task(
            name,
            group,
            root=places.get(name),
            protocol=protocol,
            batch_size=batch_size,
            device=device,
            pictures_to=None if pictures_to is None else pictures_to / file_name(name),
            count=count,
            skip_damaged=skip_damaged,
            progress=progress,
        )
        for name, group in groups.items()
    ]


def _errors(trained: Trained, options: dict[str, Any]) -> str:
    """What a checkpoint of stage 1 reached, for the terminal."""
    if options["out"] is not None:
        raise InputError(f"{trained.path}: found stage 1; expected stage 2 for a report (--out)")
    if options["skip_damaged"]:
        raise InputError(f"{trained.path}: found stage 1; expected stage 2 for --skip_damaged")
    task = options["task"] or trained.settings.data.task
    found = evaluate(
        trained.path,
        root=roots_by_task(options["root"]).get(task),
        task=task,
        batch_size=options["batch_size"],
        device=options["device"],
    )
    return found.table()


def _tables(results: Sequence[TaskResult]) -> str:
    """The summary and the classes of each task, for the terminal."""
    each = [class_table(result) for result in results]
    titles = [f"\n{result.task}" for result in results]
    parts = [summary_table(results).plain()]
    parts += [
        f"{result.task}: left out of {test}: {error}"
        for result in results
        for test, files in result.skipped.items()
        for error in files.values()
    ]
    for title, table in zip(titles, each, strict=True):
        parts += [title, table.plain()]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m spectralx.evaluate``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog="spectralx.evaluate", exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        type=str,
        nargs="+",
        required=True,
        help="folders of checkpoints, or of experiments",
    )
    parser.add_argument(
        "--task", type=str | None, help="a task, or all; by default what each was trained on"
    )
    parser.add_argument(
        "--root",
        type=str,
        nargs="+",
        default=[],
        help="data: DIR, or whu-ohs=DIR dfc2020=DIR mts12=DIR; by default where training found it",
    )
    parser.add_argument(
        "--protocol", choices=list(get_args(Protocol)), default="proper", help="rules of scoring"
    )
    parser.add_argument("--out", type=str | None, help="folder for the report")
    parser.add_argument("--pictures", type=int, default=3, help="images drawn of each test set")
    parser.add_argument(
        "--skip_damaged",
        action="store_true",
        help="leave files that cannot be read out of the tests, and name them",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="images at a time")
    parser.add_argument("--device", type=str | None, help="cpu or cuda; by default the fastest")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")

    def body() -> None:
        options = parse(parser, arguments)
        paths = options["checkpoint"]
        common = {
            "task": options["task"],
            "roots": options["root"],
            "protocol": options["protocol"],
            "batch_size": options["batch_size"],
            "device": options["device"],
            "skip_damaged": options["skip_damaged"],
        }
        first = Trained.read(find_checkpoints(paths)[0])
        if len(paths) == 1 and first.manifest["model"] == "reconstruction":
            print(_errors(first, options))
            return
        if options["out"] is None:
            print(_tables(evaluate_tasks(paths, **common)))
            return
        with write_folder(options["out"], RESULTS) as folder:
            results = evaluate_tasks(paths, **common, pictures_to=folder, count=options["pictures"])
            write_report(results, folder)
        print(_tables(results))
        print(f"report: {Path(options['out']) / 'report.html'}")

    return run_command("spectralx.evaluate", body, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
