"""MTS12: Sentinel-2 time series of Slovenia with 8 land covers; four months of six bands each.

On disk below the root::

    image/{train,val,test}/STEM.tif               24 bands
    label/{train,val,test}/STEM_label.mat         variable "label" [rows, columns]

Bands are Sentinel-2's 2, 3, 4, 8, 11, 12 for March, then June, September and December. ``train``
and ``val`` lie in the north of the country, ``test`` in the south.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import loadmat

from .errors import unreadable
from .normalise import Normalisation
from .raster import PixelWindow, check_listed, data_error, list_rasters, whole_numbers
from .tiles import UNLABELLED, Pair, TileDataset

MONTHS = ("March", "June", "September", "December")
SEASON_WAVELENGTHS = (0.490, 0.560, 0.665, 0.842, 1.610, 2.190)  # µm
WAVELENGTHS = SEASON_WAVELENGTHS * len(MONTHS)

CLASS_NAMES = (
    UNLABELLED, "cultivated land", "forest", "grassland", "shrubland", "water", "wetland",
    "artificial surface", "bare land",
)  # fmt: skip

SPLITS = {"train": "train", "validation": "val", "test": "test"}
LABEL_KEY = "label"


class Mts12(TileDataset):
    """The tiles of one or several folders of MTS12.

    Parameters
    ----------
    root : folder that holds ``image`` and ``label``.
    splits : one of "train", "validation", "test", or several (the north is the first two).
    normalisation : see :class:`spectralx.data.tiles.TileDataset`, where the samples and the
        attributes (`wavelengths`, `class_names`, ...) are described; 9 classes with 0.
    """

    def __init__(
        self,
        root: str | Path,
        splits: str | Sequence[str] = tuple(SPLITS),
        *,
        normalisation: Normalisation | None = None,
    ) -> None:
        chosen = (splits,) if isinstance(splits, str) else tuple(splits)
        pairs = [pair for split in chosen for pair in _split_pairs(Path(root), split)]
        super().__init__(
            pairs,
            name=f"MTS12 {'+'.join(chosen)}",
            wavelengths=WAVELENGTHS,
            class_names=CLASS_NAMES,
            label_reader=read_mat_label,
            normalisation=normalisation,
        )


def read_mat_label(path: Path, window: PixelWindow | None = None) -> npt.NDArray[np.int64]:
    """Label map [rows, columns] of a MATLAB file. Raises DataError where it holds none."""
    check_listed(path)
    try:
        # Damaged files make scipy raise errors of many types (zlib, struct, numpy and its own).
        content: dict[str, Any] = loadmat(path)
    except Exception as error:
        raise unreadable(
            path, f"{path.stat().st_size} bytes that do not read as one ({error})", "a MATLAB file"
        ) from error
    if LABEL_KEY not in content:
        names = [name for name in content if not name.startswith("__")]
        raise data_error(
            path, f"variables {', '.join(names) or 'none'}", f"a variable {LABEL_KEY!r}"
        )
    label = np.asarray(content[LABEL_KEY])
    if label.ndim != 2:
        raise data_error(path, f"a label of shape {label.shape}", "rows and columns")
    if window is not None:
        row, column, rows, columns = window
        label = label[row : row + rows, column : column + columns]
    return whole_numbers(path, label)


def _split_pairs(root: Path, split: str) -> list[Pair]:
    if split not in SPLITS:
        raise ValueError(f"split: found {split!r}; expected one of {', '.join(SPLITS)}")
    folder = SPLITS[split]
    images = list_rasters(root / "image" / folder, f"MTS12 {split}")
    return [Pair(path, root / "label" / folder / f"{path.stem}_label.mat") for path in images]
