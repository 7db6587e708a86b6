"""The dataset all layouts share: pairs of an image and a label map, read when asked for."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from .augment import Transform
from .checksums import Checksums
from .errors import UnreadableError, first_readable
from .labels import to_classes
from .normalise import Normalisation
from .raster import (
    Array,
    PixelWindow,
    data_error,
    raster_info,
    read_label,
    read_stored,
)
from .samples import UNLABELLED, ImageDataset, RawImages, Sample

__all__ = ["UNLABELLED", "Pair", "RawImages", "Sample", "TileDataset", "split_by_file", "tiled"]

LabelReader = Callable[[Path, PixelWindow | None], npt.NDArray[np.int64]]


class Pair(NamedTuple):
    """An image file and the file of its labels, or a window of both.

    window : (first row, first column, rows, columns); None for all of it.
    repeated : rows and columns at the window's upper left that other windows hold: unlabelled.
    """

    image: Path
    label: Path
    window: PixelWindow | None = None
    repeated: tuple[int, int] = (0, 0)

    @property
    def key(self) -> str:
        """The image, and the corner of the window if any."""
        if self.window is None:
            return str(self.image)
        return "{}[{},{}]".format(self.image, *self.window[:2])


class TileDataset(ImageDataset):
    """Images with their label maps, normalised and transformed, as :class:`Sample`.

    Parameters
    ----------
    pairs : the files, in order; all labels must exist.
    name : of the split, for error messages.
    wavelengths : centre of each band of the files in µm; each image must have as many bands.
    class_names : index 0 is "unlabelled"; their number is `num_classes`.
    label_values : raw label value to class; None keeps values as they are.
    other_labels : class of raw values that `label_values` does not name; None makes them errors.
    label_reader : reads a label file, or a window of it, to int64 [h, w].
    keep_bands : indices, from 0, of the bands of the file to use; None for all.
    nodata : value of missing pixels for image files that state none.
    checksums : holds each file to its hash when it is first read.
    normalisation, transform : see :class:`spectralx.data.samples.ImageDataset`.

    Attributes
    ----------
    bands : number of bands of a sample.
    wavelengths : tuple of floats, µm, one for each band of a sample.
    class_names : tuple of str, index 0 "unlabelled".
    num_classes : their number, "unlabelled" included.

    Raises
    ------
    DataError
        No pairs, none that can be read, a label that is missing, wavelengths that disagree with
        the first image's bands;
        when a sample is read: damaged files, sizes that differ, labels outside the classes.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        name: str,
        wavelengths: Sequence[float],
        class_names: Sequence[str],
        label_values: Mapping[int, int] | None = None,
        other_labels: int | None = None,
        label_reader: LabelReader = read_label,
        keep_bands: Sequence[int] | None = None,
        nodata: float | None = None,
        checksums: Checksums | None = None,
        normalisation: Normalisation | None = None,
        transform: Transform | None = None,
    ) -> None:
        if not pairs:
            raise data_error(name, "no images", "at least one image with its label")
        for pair in pairs:
            if not pair.label.is_file():
                raise data_error(pair.image, f"no label {pair.label}", "a label for each image")
        self.file_bands = len(wavelengths)
        kept = range(self.file_bands) if keep_bands is None else keep_bands
        first = first_readable(raster_info, [pair.image for pair in pairs])
        if first.bands != self.file_bands:
            raise data_error(
                first.path, f"{first.bands} bands", f"{self.file_bands}, as many as wavelengths"
            )
        super().__init__(
            name=name,
            wavelengths=[wavelengths[band] for band in kept],
            class_names=class_names,
            normalisation=normalisation,
            transform=transform,
        )
        self.pairs = tuple(pairs)
        self.label_values = None if label_values is None else dict(label_values)
        self.other_labels = other_labels
        self.label_reader = label_reader
        self.keep_bands = None if keep_bands is None else tuple(keep_bands)
        self.nodata = nodata
        self.checksums = checksums

    def subset(self, pairs: Sequence[Pair], *, name: str) -> Self:
        """The same dataset over other files."""
        return self._replaced(pairs=tuple(pairs), name=name, cache=None)

    def __len__(self) -> int:
        return len(self.pairs)

    def file_bytes(self) -> int:
        """Of all image files together."""
        return sum(path.stat().st_size for path in {pair.image for pair in self.pairs})

    def path_of(self, index: int) -> str:
        """The image's file, and the corner of the window if any."""
        return self.pairs[index].key

    def label_of(self, index: int) -> str:
        """The file of the labels."""
        return str(self.pairs[index].label)

    def read_pixels(self, index: int) -> tuple[Array, float | None]:
        """Image `index` as stored, [C, H, W], and the value of its missing pixels."""
        pair = self.pairs[index]
        self._verify(pair.image)
        return read_stored(
            pair.image,
            bands=self.keep_bands,
            nodata=self.nodata,
            window=pair.window,
            count=self.file_bands,
        )

    def read_classes(self, index: int) -> npt.NDArray[np.int64]:
        """Label map `index` [H, W], raw values mapped to classes."""
        _, path, window, repeated = self.pairs[index]
        self._verify(path)
        raw = self.label_reader(path, window)
        classes = to_classes(path, raw, self.num_classes, self.label_values, self.other_labels)
        rows, columns = repeated
        classes[:rows] = 0
        classes[:, :columns] = 0
        return classes

    def _verify(self, path: Path) -> None:
        if self.checksums is not None:
            self.checksums.verify(path)


def tiled(pairs: Sequence[Pair], size: int, stride: int, *, once: bool) -> list[Pair]:
    """Windows of `size` pixels over each pair, `stride` apart; the last ones end at the border.

    Images that are smaller keep their size. One that cannot be read stays whole: reading it raises.

    Parameters
    ----------
    pairs : whole files.
    size, stride : pixels.
    once : each pixel has a label in one window alone (needs ``stride == size``).

    Raises
    ------
    DataError : an image and its labels differ in size.
    """
    found = []
    for pair in pairs:
        try:
            info, labels = raster_info(pair.image), raster_info(pair.label)
        except UnreadableError:
            found.append(pair)
            continue
        if (labels.height, labels.width) != (info.height, info.width):
            raise data_error(
                pair.label,
                f"{labels.height}x{labels.width} pixels",
                f"{info.height}x{info.width}, the size of {pair.image}",
            )
        found += [
            Pair(
                pair.image,
                pair.label,
                (row, column, min(size, info.height), min(size, info.width)),
                (up, left) if once else (0, 0),
            )
            for row, up in _starts(info.height, size, stride)
            for column, left in _starts(info.width, size, stride)
        ]
    return found


def _starts(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """Where windows begin along a side, and how much of each the one before holds."""
    starts = [*range(0, max(length - size, 0), stride), max(length - size, 0)]
    return [(starts[0], 0)] + [
        (start, max(before + size - start, 0)) for before, start in pairwise(starts)
    ]


def split_by_file(
    pairs: Sequence[Pair], shares: Sequence[float], *, root: Path, name: str
) -> list[list[Pair]]:
    """Divide `pairs` into as many parts as `shares`, the same on every machine and in every order.

    Files are ranked by a checksum of their path below `root`, so neighbours on disk spread over
    the parts. Each part gets its share, rounded, and at least one file.

    Raises DataError when there are fewer files than parts.
    """
    if len(pairs) < len(shares):
        raise data_error(root, f"{len(pairs)} images in {name}", f"at least {len(shares)} to split")

    def rank(pair: Pair) -> tuple[int, str]:
        key = pair.image.relative_to(root).as_posix() + pair.key.removeprefix(str(pair.image))
        return zlib.crc32(key.encode()), key

    ranked = sorted(pairs, key=rank)
    sizes = [max(1, round(len(pairs) * share)) for share in shares[1:]]
    while sum(sizes) >= len(pairs):
        sizes[sizes.index(max(sizes))] -= 1
    bounds = [0, len(pairs) - sum(sizes)]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return [
        sorted(ranked[start:stop], key=lambda pair: (pair.image, pair.label, pair.window or ()))
        for start, stop in pairwise(bounds)
    ]
