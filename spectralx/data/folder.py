"""A general reader: any GeoTIFF tiles with label maps, told by two folders or by CSV files.

On disk below the root::

    images/ labels/                          files of the same names
    train.csv validation.csv test.csv        columns image, mask: paths below the root

Without any CSV file the tiles are divided by file. Wavelengths come from the configuration or from
the band descriptions (``"band 1 (418.24 Nanometers)"``, ``"0.466 um"``) or band tags. Bands that
hold no valid value in any training image are dropped, with a warning that names them.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .normalise import Normalisation
from .raster import (
    UnreadableError,
    data_error,
    first_readable,
    list_rasters,
    raster_info,
    read_image,
    read_label,
)
from .tiles import UNLABELLED, Pair, TileDataset, split_by_file

SPLITS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
COLUMNS = ("image", "mask")

logger = logging.getLogger(__name__)


class FolderDataset(TileDataset):
    """One split of a folder of tiles.

    Parameters
    ----------
    root : the folder.
    split : "train", "validation" or "test".
    wavelengths : µm, one for each band of the files; None takes them from the training images.
    class_names : names of classes 1, 2, ... (0, "unlabelled", is put before them); None counts up
        to the largest label of all splits, and names classes "class 1", "class 2", ...
    nodata : value of missing pixels for files that state none.
    normalisation : see :class:`spectralx.data.tiles.TileDataset`, where the samples and the other
        attributes are described.

    Attributes
    ----------
    dropped_bands : indices, from 0, of the bands left out because the training images hold no
        valid value in them; `wavelengths` and the samples are without them.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        wavelengths: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        nodata: float | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        root = Path(root)
        if split not in SPLITS:
            raise ValueError(f"split: found {split!r}; expected one of {', '.join(SPLITS)}")
        splits = folder_pairs(root)
        if split not in splits:
            raise data_error(root / f"{split}.csv", "no such file", "a CSV of image and mask")
        training = splits.get("train", splits[split])
        if wavelengths is None:
            wavelengths = first_readable(stated_wavelengths, [pair.image for pair in training])
        every = range(len(wavelengths))
        empty = empty_bands([pair.image for pair in training], len(wavelengths), nodata)
        if len(empty) == len(wavelengths):
            raise data_error(root, "nodata in all bands of all training images", "some valid value")
        if class_names is None:
            largest = max(_largest_label(pair.label) for part in splits.values() for pair in part)
            class_names = [f"class {value}" for value in range(1, largest + 1)]
        super().__init__(
            splits[split],
            name=f"{root.name} {split}",
            wavelengths=wavelengths,
            class_names=[UNLABELLED, *class_names],
            keep_bands=[band for band in every if band not in empty] if empty else None,
            nodata=nodata,
            normalisation=normalisation,
        )
        self.dropped_bands = empty
        if empty and split == "train":
            logger.warning(
                "%s: bands %s of %d hold nodata in all training images and are dropped",
                root, ", ".join(str(band + 1) for band in empty), len(wavelengths),
            )  # fmt: skip


def folder_pairs(root: str | Path) -> dict[str, list[Pair]]:
    """Files of each split of a folder: those that have a CSV, or all three by file without any.

    Raises DataError for a missing root, an empty split, a missing file, a CSV without the columns.
    """
    root = Path(root)
    if not root.is_dir():
        raise data_error(root, "no such folder", "images/, labels/ or CSV files of splits")
    tables = {split: root / f"{split}.csv" for split in SPLITS}
    if any(table.is_file() for table in tables.values()):
        return {
            split: pairs_of_csv(root, table) for split, table in tables.items() if table.is_file()
        }
    images = list_rasters(root / "images", str(root))
    pairs = [Pair(image, root / "labels" / image.name) for image in images]
    parts = split_by_file(pairs, SHARES, root=root, name=str(root))
    return dict(zip(SPLITS, parts, strict=True))


def empty_bands(images: Sequence[Path], bands: int, nodata: float | None) -> tuple[int, ...]:
    """Indices, from 0, of the bands without a single valid value in any of `images`.

    Bands that have shown a valid value are not read again, so this is quick where none is empty.
    Images that cannot be read are passed over; reading their samples raises.
    """
    suspects = list(range(bands))
    for image in images:
        if not suspects:
            break
        try:
            _, valid, _ = read_image(image, bands=suspects, nodata=nodata, count=bands)
        except UnreadableError:
            continue
        suspects = [band for band, seen in zip(suspects, valid, strict=True) if not seen.any()]
    return tuple(suspects)


def _listed(root: Path, name: str, where: str) -> Path:
    """The file `name` of a list, which lies below `root` and does not link out of it."""
    path = root / name
    try:
        whole = path.is_file()
        inside = path.resolve().is_relative_to(root.resolve())
    except ValueError as error:  # a NUL in the name
        raise data_error(where, f"{name!r} ({error})", "the path of a GeoTIFF") from error
    if not whole:
        raise data_error(where, f"no file {path}", "a GeoTIFF")
    if not inside:
        raise data_error(where, f"{name}, which is not below {root}", "a GeoTIFF of the data set")
    return path


def pairs_of_csv(root: Path, table: Path) -> list[Pair]:
    """The images and labels that a CSV file names by paths below `root`.

    Raises DataError for a missing file, missing columns, or a row of files that are not there or
    not below `root`.
    """
    if not table.is_file():
        raise data_error(table, "no such file", f"a CSV of {', '.join(COLUMNS)}")
    with table.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        columns = [name.strip() for name in reader.fieldnames or ()]
        if any(name not in columns for name in COLUMNS):
            raise data_error(
                table, f"columns {', '.join(columns) or 'none'}", f"columns {', '.join(COLUMNS)}"
            )
        reader.fieldnames = columns
        rows = list(reader)
    if not rows:
        raise data_error(table, "no rows", "at least one image with its mask")
    pairs = []
    for number, row in enumerate(rows, start=2):
        names = [(row[column] or "").strip() for column in COLUMNS]
        if not all(names):
            raise data_error(f"{table} line {number}", "an empty entry", "an image and a mask")
        image, label = (_listed(root, name, f"{table} line {number}") for name in names)
        pairs.append(Pair(image, label))
    return pairs


def stated_wavelengths(image: Path) -> tuple[float, ...]:
    """Of each band of a file, in µm. Raises DataError unless it states all of them."""
    info = raster_info(image)
    if info.wavelengths is None:
        raise data_error(
            image,
            f"no wavelengths in the descriptions of its {info.bands} bands",
            "some such as '0.466 um', or wavelengths in the configuration",
        )
    return info.wavelengths


def _largest_label(path: Path) -> int:
    """Of a file that can be read; 0 otherwise."""
    try:
        return int(np.max(read_label(path), initial=0))
    except UnreadableError:
        return 0
