"""Other people's datasets: anything that gives dictionaries of ``image`` and ``mask`` by index.

That is what torchgeo's datasets of tiles do, and any map-style dataset in its manner::

    domains = domains_of(EuroCrops(...), ...)      # or domains_of_datamodule(datamodule, ...)
    register_task("crops", domains)
    fit("stage2", load_settings("mine.yaml", ["--data.task=crops"]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .domains import Domains
from .labels import to_classes
from .raster import Array, data_error, whole_numbers
from .samples import UNLABELLED, ImageDataset, Stored

_DATASETS = ("train_dataset", "val_dataset", "test_dataset")
_STAGES = ("fit", "validate", "test")


class DictDataset(Protocol):
    """Dictionaries with ``image`` [C, H, W] and ``mask`` [H, W] or [1, H, W], by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class ForeignDataset(ImageDataset):
    """A dataset of dictionaries as one of ours: scaled, augmented and cached like it.

    Parameters
    ----------
    dataset : gives ``image`` and ``mask`` by index, as tensors or arrays; it should not scale or
        augment them itself.
    name : for errors.
    wavelengths : centre of each band, µm.
    class_names : from 1 on; 0 is "unlabelled".
    label_values : raw label to class; None where raw labels are the classes.
    other_labels : class of raw labels that `label_values` does not name; None makes them errors.
    nodata : value of missing pixels; what is not finite is missing too.
    """

    def __init__(
        self,
        dataset: DictDataset,
        *,
        name: str,
        wavelengths: Sequence[float],
        class_names: Sequence[str],
        label_values: Mapping[int, int] | None = None,
        other_labels: int | None = None,
        nodata: float | None = None,
    ) -> None:
        super().__init__(name=name, wavelengths=wavelengths, class_names=[UNLABELLED, *class_names])
        self.dataset = dataset
        self.label_values = label_values
        self.other_labels = other_labels
        self.nodata = nodata
        if len(self) == 0:
            raise data_error(name, "no images", "at least one")
        self._read(0)

    def __len__(self) -> int:
        return len(self.dataset)

    def path_of(self, index: int) -> str:
        """Name and index: a foreign sample has no file that is known."""
        return f"{self.name}[{index}]"

    def _sample(self, index: int) -> Mapping[str, Any]:
        sample = self.dataset[index]
        where = self.path_of(index)
        if not isinstance(sample, Mapping) or not {"image", "mask"} <= {*sample}:
            found = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else type(sample)
            raise data_error(where, str(found), "a dictionary with image and mask")
        return sample

    def _pixels(self, index: int, sample: Mapping[str, Any]) -> Array:
        pixels = _array(sample["image"])
        if pixels.ndim != 3 or len(pixels) != self.bands:
            raise data_error(
                f"{self.path_of(index)}: image",
                f"shape {list(pixels.shape)}",
                f"[{self.bands}, height, width], as many bands as wavelengths",
            )
        return pixels

    def _classes(self, index: int, sample: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        where, mask = self.label_of(index), _array(sample["mask"])
        if mask.ndim == 3 and len(mask) == 1:
            mask = mask[0]
        if mask.ndim != 2:
            raise data_error(where, f"shape {list(mask.shape)}", "[height, width]")
        raw = whole_numbers(where, mask)
        return to_classes(where, raw, self.num_classes, self.label_values, self.other_labels)

    def read_pixels(self, index: int) -> tuple[Array, float | None]:
        """Image `index`, [C, H, W], and the value of its missing pixels."""
        return self._pixels(index, self._sample(index)), self.nodata

    def read_classes(self, index: int) -> npt.NDArray[np.int64]:
        """Classes of image `index`, [H, W]."""
        return self._classes(index, self._sample(index))

    def _read(self, index: int) -> Stored:
        sample = self._sample(index)
        pixels, classes = self._pixels(index, sample), self._classes(index, sample)
        self.check_sizes(index, pixels, classes)
        return Stored(pixels, classes, self.nodata)


def domains_of(
    train: DictDataset,
    validation: DictDataset,
    test: DictDataset,
    *,
    targets: Mapping[str, DictDataset] | None = None,
    name: str = "own",
    **options: Any,
) -> Domains:
    """Datasets of dictionaries as the domains of a task.

    Parameters
    ----------
    train, validation, test : of the source domain.
    targets : of other domains to test on, by name.
    name : for errors.
    options : of `ForeignDataset`: wavelengths, class_names, label_values, other_labels, nodata.

    Raises
    ------
    DataError : a first sample that is none, or of other bands or labels.
    """
    source = [
        ForeignDataset(dataset, name=f"{name} {split}", **options)
        for dataset, split in ((train, "train"), (validation, "validation"), (test, "test"))
    ]
    others = {
        key: ForeignDataset(dataset, name=f"{name} {key}", **options)
        for key, dataset in (targets or {}).items()
    }
    return Domains(source, others)


def domains_of_datamodule(datamodule: Any, *, name: str = "own", **options: Any) -> Domains:
    """The datasets of a torchgeo-style datamodule as the domains of a task.

    ``setup`` is called for each stage, ``prepare_data`` is not: nothing is downloaded here.

    Parameters
    ----------
    datamodule : has ``setup(stage)``, then ``train_dataset``, ``val_dataset``, ``test_dataset``
        (torchgeo's of tiles; its geographic ones index by place, not by number).
    name, options : as for `domains_of`.
    """
    found: list[DictDataset] = []
    for stage, attribute in zip(_STAGES, _DATASETS, strict=True):
        datamodule.setup(stage)
        dataset: Any = getattr(datamodule, attribute, None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            kind = type(datamodule).__name__
            raise data_error(
                f"{kind}.{attribute}", type(dataset).__name__, "a dataset of samples by number"
            )
        found.append(dataset)
    train, validation, test = found
    return domains_of(train, validation, test, name=name, **options)


def _array(value: Any) -> Array:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        return value.numpy()  # type: ignore[no-any-return]
    return np.asarray(value)
