"""Logits of overlapping tiles blended on one grid of cells, a band of rows at a time.

What is averaged are logits, with the weights of `Axis.weights`: as upsampling is linear, that is
the same as averaging upsampled logits, but for a tile's own ends, where the blended map is
interpolated towards the neighbour instead of being held constant. Only the cells under one row of
tiles are held, not the scene.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx.prediction.tiles import Axis
from spectralx_kernels import upsample_argmax

# Cells above and below a tile that upsampling may look at.
_MARGIN = 2
# Columns of cells that are upsampled at a time.
_COLUMNS = 512


class Rows(NamedTuple):
    """Settled rows of the map, from pixel row `first` of the scene on.

    labels : int64 [rows, columns].
    probability : float32 [rows, columns] of that class, [classes, rows, columns] of all, or None.
    """

    first: int
    labels: Tensor
    probability: Tensor | None


class Blend:
    """Sums of logits and weights over the cells under a row of tiles, on the model's device.

    Parameters
    ----------
    rows, columns : the tiles.
    classes : number of them.
    probabilities : "none", "top" or "all".
    first : row of tiles that is added first.
    """

    def __init__(
        self,
        rows: Axis,
        columns: Axis,
        classes: int,
        device: torch.device,
        *,
        probabilities: str = "none",
        first: int = 0,
    ) -> None:
        self.rows, self.columns = rows, columns
        self.probabilities = probabilities
        height = min(rows.tile + _MARGIN, rows.cells)
        self._sums = torch.zeros(classes, height, columns.cells, device=device)
        self._weights = torch.zeros(height, columns.cells, device=device)
        self._base = max(rows.starts[first] - _MARGIN, 0)  # cell of the first row held
        vertical, horizontal = (
            torch.from_numpy(axis.weights()).to(device) for axis in (rows, columns)
        )
        self._window = vertical[:, None] * horizontal

    def add(self, row: int, columns: tuple[int, ...], logits: Tensor) -> None:
        """Logits [B, classes, h, w] of tiles of row of tiles `row`, one after the other."""
        top = self.rows.starts[row] - self._base
        weighted = logits.float() * self._window
        for tile, column in enumerate(columns):
            left = self.columns.starts[column]
            area = (
                slice(top, top + self.rows.tile),
                slice(left, left + self.columns.tile),
            )
            self._sums[(slice(None), *area)] += weighted[tile]
            self._weights[area] += self._window

    def settled(self, row: int) -> Rows | None:
        """The rows of the map that `row`, the last added row of tiles, settles; None for none."""
        first, last = self.rows.emitted(row - 1), self.rows.emitted(row)
        if last <= first:
            return None
        top, bottom = max(first - 1, 0), min(last + 1, self.rows.cells)
        begin, end = _clipped(self.rows, first, last)
        labels = torch.empty(end - begin, self.columns.pixels, dtype=torch.int64)
        probability: Tensor | None = None
        if self.probabilities != "none":
            layers = (len(self._sums),) if self.probabilities == "all" else ()
            probability = torch.empty(*layers, *labels.shape)
        skipped = begin - (self.rows.origin + top * self.rows.cell)
        for left in range(0, self.columns.cells, _COLUMNS):
            right = min(left + _COLUMNS, self.columns.cells)
            outer = max(left - 1, 0), min(right + 1, self.columns.cells)
            held = (slice(top - self._base, bottom - self._base), slice(*outer))
            # Cells that no tile with a valid pixel covers keep logits of 0.
            weights = self._weights[held].clamp_min(torch.finfo(torch.float32).tiny)
            found, share = self._classified(self._sums[(slice(None), *held)] / weights)
            from_column, to_column = _clipped(self.columns, left, right)
            start = from_column - (self.columns.origin + outer[0] * self.columns.cell)
            inner = (
                slice(skipped, skipped + end - begin),
                slice(start, start + to_column - from_column),
            )
            labels[:, from_column:to_column] = found[inner]
            if probability is not None and share is not None:
                probability[..., from_column:to_column] = share[(..., *inner)]
        return Rows(begin, labels, probability)

    def _classified(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels and probabilities [.., h * cell, w * cell] of logits [classes, h, w]."""
        size = (logits.shape[1] * self.rows.cell, logits.shape[2] * self.columns.cell)
        if self.probabilities == "none":
            return upsample_argmax(logits[None], size)[0], None
        label, probability = upsample_argmax(logits[None], size, return_probability=True)
        if self.probabilities == "top":
            return label[0], probability[0]
        upsampled = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)
        return label[0], upsampled[0].softmax(0)

    def advance(self, row: int) -> None:
        """Forget the cells that no row of tiles behind `row` needs."""
        base = max(self.rows.starts[row + 1] - _MARGIN, 0)
        gone = base - self._base
        for sums in (self._sums, self._weights):
            height = sums.shape[-2]
            kept = sums[..., gone:, :].clone()
            sums[..., : height - gone, :] = kept
            sums[..., height - gone :, :] = 0.0
        self._base = base


def _clipped(axis: Axis, first: int, last: int) -> tuple[int, int]:
    """Pixels of the scene in cells `first` to `last`: the first, and the one behind."""
    begin, end = (axis.origin + cell * axis.cell for cell in (first, last))
    return min(max(begin, 0), axis.pixels), min(max(end, 0), axis.pixels)


class ValidRows:
    """Whether the pixels under a row of tiles are valid; where none can be missing, nothing.

    Parameters
    ----------
    rows, columns : the tiles.
    needed : whether a pixel can be missing.
    first : row of tiles that is read first.
    """

    def __init__(self, rows: Axis, columns: Axis, *, needed: bool, first: int = 0) -> None:
        self.rows = rows
        self._base = self._top(first)
        self._held: npt.NDArray[np.bool_] | None = None
        if needed:
            height = min((rows.tile + 2 * _MARGIN) * rows.cell, rows.pixels)
            self._held = np.zeros((height, columns.pixels), dtype=bool)

    def _top(self, row: int) -> int:
        """First pixel row that is still needed when row of tiles `row` is read."""
        cell = max(self.rows.starts[row] - _MARGIN, 0)
        return max(self.rows.origin + cell * self.rows.cell, 0)

    def put(self, row: int, column: int, valid: npt.NDArray[np.bool_] | None) -> None:
        """Keep `valid` [rows, columns] of row of tiles `row`, from pixel column `column` on."""
        if self._held is not None and valid is not None:
            top = max(self.rows.span(row, row)[0], 0) - self._base
            height, width = valid.shape
            self._held[top : top + height, column : column + width] = valid

    def missing(self, first: int, count: int) -> npt.NDArray[np.bool_] | None:
        """Where `count` rows from pixel row `first` on are not valid; None for nowhere."""
        if self._held is None:
            return None
        return ~self._held[first - self._base : first - self._base + count]

    def advance(self, row: int) -> None:
        """Forget the rows that no row of tiles behind `row` needs."""
        if self._held is not None:
            base = self._top(row + 1)
            gone = base - self._base
            self._held[: len(self._held) - gone] = self._held[gone:].copy()
            self._base = base
