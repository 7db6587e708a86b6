"""Raw labels of files to the classes of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .raster import data_error


def to_classes(
    where: str | Path,
    raw: npt.NDArray[np.int64],
    num_classes: int,
    label_values: Mapping[int, int] | None = None,
    other_labels: int | None = None,
) -> npt.NDArray[np.int64]:
    """Classes of raw labels.

    Parameters
    ----------
    where : what to name in errors.
    raw : labels, of any shape.
    num_classes : classes are 0 to ``num_classes - 1``.
    label_values : raw label to class; None where raw labels are the classes.
    other_labels : class of labels that `label_values` does not name; None makes them errors.

    Raises
    ------
    DataError : a label that is no class.
    """
    if label_values is None:
        _check_range(where, raw, num_classes - 1)
        return raw
    known = np.array(sorted(label_values))
    place = np.searchsorted(known, raw).clip(max=len(known) - 1)
    named = known[place] == raw
    if other_labels is None and not named.all():
        raise data_error(where, f"label {raw[~named][0]}", f"one of {_ranges(label_values)}")
    classes = np.array([label_values[value] for value in known.tolist()])[place]
    return np.where(named, classes, other_labels or 0).astype(np.int64)


def _check_range(where: str | Path, raw: npt.NDArray[np.int64], largest: int) -> None:
    outside = (raw < 0) | (raw > largest)
    if outside.any():
        raise data_error(where, f"label {raw[outside][0]}", f"classes 0 to {largest}")


def _ranges(values: Mapping[int, int]) -> str:
    """``0-4, 6`` for the keys of `values`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
