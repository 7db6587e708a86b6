"""Scores of a segmentation, from one confusion matrix over all pixels of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from spectralx_kernels import confusion_matrix_update

Protocol = Literal["proper", "official"]
NO_LABEL = -100  # ignored where every class counts: a value that no label has


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, NaN where `whole` is 0."""
    return torch.where(whole > 0, part / whole.clamp(min=1), torch.nan)


class Scores:
    """What a confusion matrix says.

    Which classes are averaged (`miou`, `mean_f1`): those that occur in the truth or in the
    prediction; the ignored class never. Under the ``official`` protocol (the published code's):
    those that occur in the truth, and pixels predicted as the ignored class are left out.

    Attributes
    ----------
    matrix : int64 [K, K], rows are the truth, columns the prediction.
    class_names : K names.
    ignore_index : the class that is no truth, or None. Predicting it counts as a miss.
    protocol : see above.
    """

    def __init__(
        self,
        matrix: Tensor,
        class_names: Sequence[str],
        ignore_index: int | None = 0,
        protocol: Protocol = "proper",
    ) -> None:
        self.matrix = matrix
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index
        self.protocol: Protocol = protocol

    @property
    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hits, truth and prediction, float64 [K] each; all zero for the ignored class."""
        matrix = self.matrix.double().cpu().clone()
        if self.ignore_index is not None:
            matrix[self.ignore_index] = 0
            if self.protocol == "official":
                matrix[:, self.ignore_index] = 0
        hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        if self.ignore_index is not None:
            predicted = predicted.clone()
            predicted[self.ignore_index] = 0
        return hits, truth, predicted

    def _averaged(self) -> Tensor:
        _, truth, predicted = self._counts
        return truth > 0 if self.protocol == "official" else truth + predicted > 0

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 [K]; NaN where it is in neither."""
        hits, truth, predicted = self._counts
        return _ratio(hits, truth + predicted - hits)

    @property
    def f1(self) -> Tensor:
        """F1 (twice the hits over truth plus prediction) of each class, float64 [K]."""
        hits, truth, predicted = self._counts
        return _ratio(2 * hits, truth + predicted)

    @property
    def precision(self) -> Tensor:
        """Hits over predicted pixels (user's accuracy), float64 [K]."""
        hits, _, predicted = self._counts
        return _ratio(hits, predicted)

    @property
    def recall(self) -> Tensor:
        """Hits over true pixels (producer's accuracy), float64 [K]."""
        hits, truth, _ = self._counts
        return _ratio(hits, truth)

    @property
    def miou(self) -> float:
        """Mean IoU over the averaged classes; NaN with no labelled pixel."""
        return float(self.iou[self._averaged()].mean())

    @property
    def mean_f1(self) -> float:
        """Mean F1 over the averaged classes."""
        return float(self.f1[self._averaged()].mean())

    @property
    def overall_accuracy(self) -> float:
        """Correct pixels over labelled pixels."""
        hits, truth, _ = self._counts
        return float(_ratio(hits.sum(), truth.sum()))

    @property
    def kappa(self) -> float:
        """Cohen's kappa; NaN where agreement by chance is already complete."""
        hits, truth, predicted = self._counts
        total = truth.sum()
        chance = (truth * predicted).sum()
        return float(_ratio(hits.sum() * total - chance, total * total - chance))

    @property
    def pixels(self) -> int:
        """Number of labelled pixels scored."""
        return int(self._counts[1].sum())

    def summary(self) -> dict[str, float]:
        """The overall figures by name: ``miou``, ``overall_accuracy``, ``f1``, ``kappa``."""
        return {
            "miou": self.miou,
            "overall_accuracy": self.overall_accuracy,
            "f1": self.mean_f1,
            "kappa": self.kappa,
        }

    def majority_miou(self, majority: int | None = None) -> float:
        """mIoU of always answering class `majority` (by default the commonest) on this truth."""
        _, truth, _ = self._counts
        chosen = int(truth.argmax()) if majority is None else majority
        constant = torch.zeros_like(self.matrix)
        constant[:, chosen] = truth.to(constant)
        return Scores(constant, self.class_names, self.ignore_index, self.protocol).miou


class SegmentationScores(Metric):
    """Accumulates a confusion matrix over batches, with ``sync_on_compute=True`` over processes.

    Not by default: one that scores by itself would wait for the others for ever.

    Parameters
    ----------
    class_names : one name a class, index 0 first.
    ignore_index : label of pixels that are not scored, or None.
    protocol : ``proper``, or ``official`` for the published code's averages (see `Scores`).
    """

    full_state_update = False
    higher_is_better = True
    matrix: Tensor

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        ignore_index: int | None = 0,
        protocol: Protocol = "proper",
        **torchmetrics_options: Any,
    ) -> None:
        super().__init__(**{"sync_on_compute": False, **torchmetrics_options})
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index
        self.protocol: Protocol = protocol
        size = len(self.class_names)
        self.add_state(
            "matrix", default=torch.zeros(size, size, dtype=torch.int64), dist_reduce_fx="sum"
        )

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch.

        Parameters
        ----------
        prediction, target : class indices, integer tensors of one shape.

        Raises
        ------
        ValueError : other shapes, or on a CPU an index that is no class.
        """
        ignored = NO_LABEL if self.ignore_index is None else self.ignore_index
        self.matrix = confusion_matrix_update(self.matrix, prediction, target, ignored)

    def compute(self) -> Scores:
        """The scores of everything counted since the last ``reset``."""
        return Scores(self.matrix.clone(), self.class_names, self.ignore_index, self.protocol)


def score_table(columns: dict[str, Scores]) -> str:
    """Per-class IoU and the overall figures, in percent, one column a data set.

    Parameters
    ----------
    columns : heading -> scores; all of the same classes.
    """
    first = next(iter(columns.values()))
    rows: list[tuple[str, list[float]]] = []
    ious = {heading: scores.iou for heading, scores in columns.items()}
    for index, name in enumerate(first.class_names):
        if index != first.ignore_index:
            rows.append((f"IoU {name}", [float(iou[index]) for iou in ious.values()]))
    summaries = [scores.summary() for scores in columns.values()]
    for key, heading in (
        ("miou", "mIoU"),
        ("overall_accuracy", "overall accuracy"),
        ("f1", "mean F1"),
        ("kappa", "kappa"),
    ):
        rows.append((heading, [summary[key] for summary in summaries]))
    left = max(len(name) for name, _ in rows)
    widths = [max(len(heading), 6) for heading in columns]

    def line(name: str, cells: list[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"{name.ljust(left)}  " + "  ".join(padded)

    rule = "-" * len(line("", ["" for _ in widths]))
    body = [
        line(name, ["-" if value != value else f"{100 * value:.1f}" for value in values])
        for name, values in rows
    ]
    return "\n".join([line("percent", list(columns)), rule, *body[:-4], rule, *body[-4:]])
