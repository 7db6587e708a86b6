"""What the checkpoints of one experiment reached on a task: confusion matrices, and figures.

A figure is a mean over seeds with its standard deviation (n - 1 below the sum).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from spectralx.data.damage import Skipped
from spectralx.evaluation.scoring import Size
from spectralx.metrics import Protocol, Scores

POOLED = "target pooled"
SOURCE = "source"
OVERALL: Mapping[str, str] = {
    "miou": "mIoU",
    "overall_accuracy": "overall accuracy",
    "f1": "mean F1",
    "kappa": "kappa",
}
PER_CLASS: Mapping[str, str] = {
    "iou": "IoU",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
}
SIZES: tuple[Size, ...] = ("native", "model")


@dataclass(frozen=True)
class Figure:
    """A mean over seeds.

    Attributes
    ----------
    values : of each seed; NaN where it is not defined.
    """

    values: tuple[float, ...]

    @property
    def _defined(self) -> list[float]:
        return [value for value in self.values if not math.isnan(value)]

    @property
    def mean(self) -> float:
        """Mean over the seeds where it is defined; NaN where it is in none."""
        return mean(self._defined) if self._defined else math.nan

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None with fewer than two."""
        return stdev(self._defined) if len(self._defined) > 1 else None

    def percent(self) -> str:
        """``45.1 ± 0.3`` in percent, ``-`` where it is not defined."""
        if math.isnan(self.mean):
            return "-"
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it, null where it is not defined."""
        return {
            "mean": None if math.isnan(self.mean) else self.mean,
            "deviation": self.deviation,
            "values": [None if math.isnan(value) else value for value in self.values],
        }


@dataclass(frozen=True)
class SeedResult:
    """One checkpoint on the test sets of a task.

    Attributes
    ----------
    checkpoint : its folder.
    seed : it was trained with.
    step : it was saved at, if it is known.
    matrices : size -> test set ("source", "target", "target ...") -> int64 [K, K].
    """

    checkpoint: str
    seed: int
    step: int | None
    matrices: Mapping[Size, Mapping[str, Tensor]]


@dataclass(frozen=True)
class TaskResult:
    """The checkpoints of one experiment, which differ by seed, on a task.

    Attributes
    ----------
    task : its name.
    trained_on : task the checkpoints were trained on.
    model : what was trained, in words.
    selected_on_target : whether the checkpoints were chosen as the published protocol does.
    class_names : index 0 unlabelled.
    image_size : (height, width) the model sees.
    native_sizes : sizes of the label files, (height, width), without repetition.
    protocol : of the averages; see `spectralx.metrics.Scores`.
    seeds : one result a checkpoint.
    skipped : damaged files that were left out of each test set, as was asked, with their errors.
    """

    task: str
    trained_on: str
    model: str
    selected_on_target: bool
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    native_sizes: tuple[tuple[int, int], ...]
    protocol: Protocol
    seeds: Sequence[SeedResult]
    skipped: Skipped = field(default_factory=dict)

    @property
    def headline(self) -> Size:
        """The size of the main figures: native, or the model's in the published protocol."""
        return "model" if self.protocol == "official" else "native"

    @property
    def targets(self) -> list[str]:
        """Test sets of other domains."""
        return [name for name in self.seeds[0].matrices["native"] if name != SOURCE]

    @property
    def tests(self) -> list[str]:
        """The source, the targets, and the targets pooled where there are several."""
        return [SOURCE, *self.targets, *([POOLED] if len(self.targets) > 1 else [])]

    @property
    def main_test(self) -> str:
        """The test set of the main figure: all targets together, or the source without any."""
        return self.tests[-1]

    def size_name(self, size: Size) -> str:
        """``native size (512 x 512)`` or ``224 x 224``."""
        if size == "model":
            return "{} x {}".format(*self.image_size)
        return "native size ({})".format(", ".join("{} x {}".format(*s) for s in self.native_sizes))

    def matrix(self, size: Size, test: str, seed: SeedResult) -> Tensor:
        """Confusion matrix of one seed; that of all targets added up for "target pooled"."""
        matrices = seed.matrices[size]
        if test != POOLED:
            return matrices[test]
        total = matrices[self.targets[0]].clone()
        for name in self.targets[1:]:
            total += matrices[name]
        return total

    def scores(self, size: Size, test: str) -> list[Scores]:
        """Scores of each seed."""
        return [
            Scores(self.matrix(size, test, seed), self.class_names, 0, self.protocol)
            for seed in self.seeds
        ]

    def figure(self, size: Size, test: str, name: str) -> Figure:
        """An overall figure; `name` is one of `OVERALL`."""
        return Figure(tuple(one.summary()[name] for one in self.scores(size, test)))

    def class_figures(self, size: Size, test: str, name: str = "iou") -> list[Figure]:
        """A figure of each class, the unlabelled one too; `name` is one of `PER_CLASS`."""
        columns = [getattr(one, name).tolist() for one in self.scores(size, test)]
        return [Figure(tuple(values)) for values in zip(*columns, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it; figures are shares of 1."""

        def each_test(found: Callable[[Size, str], Any]) -> dict[str, Any]:
            return {size: {test: found(size, test) for test in self.tests} for size in SIZES}

        return {
            "task": self.task,
            "trained_on": self.trained_on,
            "model": self.model,
            "protocol": self.protocol,
            "selected_on_target": self.selected_on_target,
            "image_size": list(self.image_size),
            "native_sizes": [list(size) for size in self.native_sizes],
            "class_names": list(self.class_names),
            "skipped": self.skipped,
            "seeds": [
                {"checkpoint": seed.checkpoint, "seed": seed.seed, "step": seed.step}
                for seed in self.seeds
            ],
            "overall": each_test(
                lambda size, test: {
                    name: self.figure(size, test, name).as_dict() for name in OVERALL
                }
            ),
            "classes": each_test(
                lambda size, test: {
                    name: [figure.as_dict() for figure in self.class_figures(size, test, name)]
                    for name in PER_CLASS
                }
            ),
            "confusion": each_test(
                lambda size, test: [self.matrix(size, test, seed).tolist() for seed in self.seeds]
            ),
        }
