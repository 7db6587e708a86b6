"""A stage that is done: what it reached, kept so that it is not done twice."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from spectralx.cli import InputError, write_text
from spectralx.data.damage import Skipped
from spectralx.evaluate import Evaluation
from spectralx.metrics import Scores

FINISHED = "finished.json"


@dataclass
class FitResult:
    """What a stage left behind.

    Attributes
    ----------
    folder : of the stage: checkpoints, logs, pictures.
    best, last : folders of the two checkpoints.
    before, after : validation figures before the first and after the last step, by name.
    evaluation : the best checkpoint on the test sets; None on all processes but the first.
    skipped : damaged files that were left out as `data.skip_damaged` asks, with their errors, by
        set.
    """

    folder: Path
    best: Path
    last: Path
    before: dict[str, float]
    after: dict[str, float]
    evaluation: Evaluation | None
    skipped: Skipped = field(default_factory=dict)


@dataclass
class Finished:
    """A result, and of what run.

    Attributes
    ----------
    step : optimiser steps done.
    stopped : whether early stopping ended it.
    about : of the run, to be compared.
    """

    result: FitResult
    step: int
    stopped: bool
    about: dict[str, Any]


def write_finished(finished: Finished) -> None:
    """Write ``finished.json`` into the stage's folder, in one step."""
    result = finished.result
    assert result.evaluation is not None
    scores = result.evaluation.scores
    values = {
        "step": finished.step,
        "stopped": finished.stopped,
        "before": result.before,
        "after": result.after,
        "tests": result.evaluation.tests,
        "skipped": result.skipped,
        "scores": {
            name: {
                "matrix": each.matrix.tolist(),
                "class_names": each.class_names,
                "ignore_index": each.ignore_index,
                "protocol": each.protocol,
            }
            for name, each in scores.items()
        },
        "about": finished.about,
    }
    write_text(result.folder / FINISHED, json.dumps(values) + "\n")


def read_finished(folder: Path) -> Finished | None:
    """What `write_finished` wrote into `folder`; None where it did not.

    Raises
    ------
    InputError : the file is something else.
    """
    file = folder / FINISHED
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        scores = {
            name: Scores(
                torch.tensor(each["matrix"], dtype=torch.int64),
                each["class_names"],
                each["ignore_index"],
                each["protocol"],
            )
            for name, each in values["scores"].items()
        }
        evaluation = Evaluation(values["tests"], scores)
        result = FitResult(
            folder,
            folder / "best",
            folder / "last",
            values["before"],
            values["after"],
            evaluation,
            values.get("skipped", {}),
        )
        return Finished(result, values["step"], values["stopped"], values["about"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: found something else than a result; expected what a finished run leaves "
            "(--fresh starts again)"
        ) from error
