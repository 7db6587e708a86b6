"""The dataset all layouts share: pairs of an image and a label map, read when asked for."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Transform
from .normalise import ImageMinMax, Normalisation
from .raster import data_error, raster_info, read_image, read_label

UNLABELLED = "unlabelled"


class Pair(NamedTuple):
    """An image file and the file of its labels."""

    image: Path
    label: Path


class Sample(TypedDict):
    """image float32 [C, H, W], mask int64 [h, w] of classes (0: unlabelled), path of the image.

    The mask has the image's size unless a transform resized the image alone.
    """

    image: Tensor
    mask: Tensor
    path: str


class TileDataset(Dataset[Sample]):
    """Images with their label maps, normalised and transformed, as :class:`Sample`.

    Parameters
    ----------
    pairs : the files, in order; all labels must exist.
    name : of the split, for error messages.
    wavelengths : centre of each band of the files in µm; each image must have as many bands.
    class_names : index 0 is "unlabelled"; their number is `num_classes`.
    label_values : raw label value to class; None keeps values as they are.
    other_labels : class of raw values that `label_values` does not name; None makes them errors.
    label_reader : reads a label file to int64 [h, w].
    keep_bands : indices, from 0, of the bands of the file to use; None for all.
    nodata : value of missing pixels for image files that state none.
    normalisation : see :mod:`spectralx.data.normalise`; the paper's by default.
    transform : see :mod:`spectralx.data.augment`. Its generator is seeded from torch's global one,
        which data-loading processes seed themselves: repeatable by `torch.manual_seed`.

    Attributes
    ----------
    bands : number of bands of a sample.
    wavelengths : tuple of floats, µm, one for each band of a sample.
    class_names : tuple of str, index 0 "unlabelled".
    num_classes : their number, "unlabelled" included.

    Raises
    ------
    DataError
        No pairs, a label that is missing, wavelengths that disagree with the first image's bands;
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
        label_reader: Callable[[Path], npt.NDArray[np.int64]] = read_label,
        keep_bands: Sequence[int] | None = None,
        nodata: float | None = None,
        normalisation: Normalisation | None = None,
        transform: Transform | None = None,
    ) -> None:
        if not pairs:
            raise data_error(name, "no images", "at least one image with its label")
        for image, label in pairs:
            if not label.is_file():
                raise data_error(image, f"no label {label}", "a label for each image")
        self.pairs = tuple(pairs)
        self.name = name
        self.file_bands = len(wavelengths)
        kept = range(self.file_bands) if keep_bands is None else keep_bands
        self.wavelengths = tuple(float(wavelengths[band]) for band in kept)
        found = raster_info(pairs[0].image).bands
        if found != self.file_bands:
            raise data_error(
                pairs[0].image, f"{found} bands", f"{self.file_bands}, as many as wavelengths"
            )
        self.class_names = tuple(class_names)
        self.label_values = None if label_values is None else dict(label_values)
        self.other_labels = other_labels
        self.label_reader = label_reader
        self.keep_bands = None if keep_bands is None else tuple(keep_bands)
        self.nodata = nodata
        self.normalisation = normalisation or ImageMinMax()
        self.transform = transform

    @property
    def bands(self) -> int:
        """Number of bands of a sample."""
        return len(self.wavelengths)

    @property
    def num_classes(self) -> int:
        """Number of classes, "unlabelled" (index 0) included."""
        return len(self.class_names)

    @property
    def raw(self) -> RawImages:
        """The images as they are on disk: (values, valid) by index, for statistics."""
        return RawImages(self)

    def subset(self, pairs: Sequence[Pair], *, name: str) -> Self:
        """The same dataset over other files."""
        return self._replaced(pairs=pairs, name=name)

    def with_transform(self, transform: Transform | None) -> Self:
        """The same dataset with another transform."""
        return self._replaced(transform=transform)

    def with_normalisation(self, normalisation: Normalisation) -> Self:
        """The same dataset with another normalisation."""
        return self._replaced(normalisation=normalisation)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        values, valid = self.read_values(index)
        mask_values = self.read_classes(index)
        if mask_values.shape != values.shape[1:]:
            raise data_error(
                pair.label,
                "{}x{} pixels".format(*mask_values.shape),
                "{}x{}, the size of {}".format(*values.shape[1:], pair.image),
            )
        mask_values[~valid.any(axis=0)] = 0
        image = torch.from_numpy(self.normalisation(values, valid))
        mask = torch.from_numpy(mask_values)
        if self.transform is not None:
            generator = torch.Generator()
            generator.manual_seed(int(torch.randint(2**62, ())))
            image, mask = self.transform(image, mask, generator)
        return {
            "image": image.contiguous(),
            "mask": mask.contiguous(),
            "path": str(pair.image),
        }

    def read_values(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Image `index` as on disk: values [C, H, W] (0 where missing) and where they are valid."""
        path = self.pairs[index].image
        values, valid, _ = read_image(
            path, bands=self.keep_bands, nodata=self.nodata, count=self.file_bands
        )
        return values, valid

    def read_classes(self, index: int) -> npt.NDArray[np.int64]:
        """Label map `index` [H, W], raw values mapped to classes."""
        path = self.pairs[index].label
        raw = self.label_reader(path)
        if self.label_values is None:
            _check_range(path, raw, self.num_classes - 1)
            return raw
        known = np.array(sorted(self.label_values))
        place = np.searchsorted(known, raw).clip(max=len(known) - 1)
        named = known[place] == raw
        if self.other_labels is None and not named.all():
            raise data_error(
                path, f"label {raw[~named][0]}", f"one of {_ranges(self.label_values)}"
            )
        classes = np.array([self.label_values[value] for value in known.tolist()])[place]
        return np.where(named, classes, self.other_labels or 0).astype(np.int64)

    def _replaced(self, **changes: object) -> Self:
        other = copy(self)
        for key, value in changes.items():
            setattr(other, key, value)
        return other


class RawImages:
    """Values and validity of a dataset's images by index; see `TileDataset.raw`."""

    def __init__(self, dataset: TileDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return self.dataset.read_values(index)


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
        key = pair.image.relative_to(root).as_posix()
        return zlib.crc32(key.encode()), key

    ranked = sorted(pairs, key=rank)
    sizes = [max(1, round(len(pairs) * share)) for share in shares[1:]]
    while sum(sizes) >= len(pairs):
        sizes[sizes.index(max(sizes))] -= 1
    bounds = [0, len(pairs) - sum(sizes)]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    return [sorted(ranked[start:stop]) for start, stop in pairwise(bounds)]


def _check_range(path: Path, raw: npt.NDArray[np.int64], largest: int) -> None:
    outside = (raw < 0) | (raw > largest)
    if outside.any():
        raise data_error(path, f"label {raw[outside][0]}", f"classes 0 to {largest}")


def _ranges(values: Mapping[int, int]) -> str:
    """``0-4, 6`` for the keys of `values`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
