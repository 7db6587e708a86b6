"""What every dataset here is: raw images with their classes, scaled and transformed on demand.

A sample is read as it is stored (`Stored`). Either it is scaled and resized at once (`Sample`), or
it stays in its stored type until it is on the device (`RawSample`), where `finish` does the same
sums. Whatever is random has been done by then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol, Self, TypedDict

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Transform, without_resizing
from .normalise import (
    ImageMinMax,
    MeasuredNormalisation,
    Normalisation,
    Scaling,
    extremes,
)
from .raster import Array, as_values, data_error, valid_values
from .registration import at_offset

UNLABELLED = "unlabelled"
# Types that stay as they are until the device; of others float32 takes no more.
_SMALL = ("int8", "uint8", "int16", "uint16")


class Stored(NamedTuple):
    """pixels [C, H, W] in the type of the file, classes [H, W], value of missing pixels."""

    pixels: Array
    classes: npt.NDArray[Any]
    nodata: float | None


class Sample(TypedDict):
    """image float32 [C, H, W], mask int64 [h, w] of classes (0: unlabelled), path of the image.

    The mask has the image's size unless a transform resized the image alone.
    """

    image: Tensor
    mask: Tensor
    path: str


class RawSample(Sample):
    """A sample whose image has not been scaled, nor resized; see `finish`.

    image [C, H, W] as stored (float32 if that takes no more), low and inverse float32 [C] of its
    scaling, nodata float32 [] (NaN: none), offset float32 [C] to add to its scaled valid values.
    """

    low: Tensor
    inverse: Tensor
    nodata: Tensor
    offset: Tensor


class Batch(TypedDict):
    """image [B, C, H, W]; mask [B, h, w], or B masks of different sizes; path of each image."""

    image: Tensor
    mask: Tensor | list[Tensor]
    path: list[str]


class Cache(Protocol):
    """Keeps stored samples by what they are made of."""

    def get(self, index: int) -> Stored | None: ...
    def put(self, index: int, stored: Stored) -> None: ...


class ImageDataset(Dataset[Sample], ABC):
    """Base of datasets; subclasses read pixels and classes by index.

    Parameters
    ----------
    name : of the split, for error messages.
    wavelengths : centre of each band of a sample, µm.
    class_names : index 0 is "unlabelled"; their number is `num_classes`.
    normalisation : see :mod:`spectralx.data.normalise`; the paper's by default.
    transform : see :mod:`spectralx.data.augment`. Its generator is seeded from torch's global one,
        which data-loading processes seed themselves: repeatable by `torch.manual_seed`.

    Attributes
    ----------
    raw_samples : whether samples are `RawSample`, for `finish`.
    jitter : deviation of the random offset of each band of an image, in scaled values.
    label_offset : see `with_label_offset`.
    cache : of stored samples; None reads them anew.
    """

    def __init__(
        self,
        *,
        name: str,
        wavelengths: Sequence[float],
        class_names: Sequence[str],
        normalisation: Normalisation | None = None,
        transform: Transform | None = None,
    ) -> None:
        self.name = name
        self.wavelengths = tuple(float(each) for each in wavelengths)
        self.class_names = tuple(class_names)
        self.normalisation = normalisation or ImageMinMax()
        self.transform = transform
        self.raw_samples = False
        self.jitter = 0.0
        self.label_offset = (0.0, 0.0)
        self.cache: Cache | None = None

    @abstractmethod
    def read_pixels(self, index: int) -> tuple[Array, float | None]:
        """Image `index` as stored, [C, H, W], and the value of its missing pixels."""

    @abstractmethod
    def read_classes(self, index: int) -> npt.NDArray[np.int64]:
        """Classes of image `index`, [H, W]."""

    def file_bytes(self) -> int | None:
        """Of all images together; None where nobody knows."""
        return None

    @abstractmethod
    def path_of(self, index: int) -> str:
        """What to call image `index`: its file."""

    def label_of(self, index: int) -> str:
        """What to call the labels of image `index`: their file."""
        return f"{self.path_of(index)}: mask"

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

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

    def with_transform(self, transform: Transform | None) -> Self:
        """The same dataset with another transform."""
        return self._replaced(transform=transform)

    def with_normalisation(self, normalisation: Normalisation) -> Self:
        """The same dataset with another normalisation."""
        return self._replaced(normalisation=normalisation)

    def with_jitter(self, deviation: float) -> Self:
        """The same dataset, each band of each image moved by a normal offset drawn anew.

        Raises ValueError for a negative deviation.
        """
        if not deviation >= 0:
            raise ValueError(f"spectral_jitter: found {deviation}; expected at least 0")
        return self._replaced(jitter=deviation)

    def with_label_offset(self, offset: tuple[float, float]) -> Self:
        """The same, images resampled to labels of places `offset` (rows, columns) away."""
        return self._replaced(label_offset=offset)

    def with_cache(self, cache: Cache | None) -> Self:
        """The same dataset that keeps what it reads in `cache`."""
        return self._replaced(cache=cache)

    def with_raw_samples(self) -> Self:
        """The same dataset that leaves scaling and resizing to `finish`."""
        return self._replaced(raw_samples=True, transform=without_resizing(self.transform))

    def read(self, index: int) -> Stored:
        """Image `index` and its classes, from the cache where they are."""
        found = None if self.cache is None else self.cache.get(index)
        if found is None:
            found = self._read(index)
            if self.cache is not None:
                self.cache.put(index, found)
        return found

    def _read(self, index: int) -> Stored:
        pixels, nodata = self._placed_pixels(index)
        classes = self.read_classes(index)
        self.check_sizes(index, pixels, classes)
        return Stored(pixels, classes, nodata)

    def check_sizes(self, index: int, pixels: Array, classes: npt.NDArray[Any]) -> None:
        """Raise DataError where image and labels differ in size."""
        if classes.shape != pixels.shape[1:]:
            raise data_error(
                self.label_of(index),
                "{}x{} pixels".format(*classes.shape),
                "{}x{}, the size of {}".format(*pixels.shape[1:], self.path_of(index)),
            )

    def read_values(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Image `index` unscaled: values [C, H, W] (0 where missing) and where they are valid."""
        return as_values(*self._placed_pixels(index))

    def _placed_pixels(self, index: int) -> tuple[Array, float | None]:
        return at_offset(*self.read_pixels(index), self.label_offset)

    def __getitem__(self, index: int) -> Sample:
        pixels, classes, nodata = self.read(index)
        values: Array = pixels
        valid: npt.NDArray[np.bool_]
        if self.raw_samples and nodata is None and pixels.dtype.kind in "iu":
            valid = np.broadcast_to(np.True_, pixels.shape)
        elif self.raw_samples:
            valid = valid_values(pixels, nodata)
        else:
            values, valid = as_values(pixels, nodata)
        mask = torch.from_numpy(np.where(valid.any(axis=0), classes, 0).astype(np.int64))
        generator = torch.Generator()
        if self.transform is not None or self.jitter:
            generator.manual_seed(int(torch.randint(2**62, ())))
        offset = torch.zeros(len(pixels))
        if self.jitter:
            offset = self.jitter * torch.randn(len(pixels), generator=generator)
        if self.raw_samples:
            return self._raw_sample(index, pixels, valid, mask, nodata, offset, generator)
        scaled = torch.from_numpy(self.normalisation(values, valid))
        if self.jitter:
            scaled += offset[:, None, None] * torch.from_numpy(valid)
        image, mask = self._transformed(scaled, mask, generator)
        return {"image": image, "mask": mask, "path": self.path_of(index)}

    def _raw_sample(
        self,
        index: int,
        pixels: Array,
        valid: npt.NDArray[np.bool_],
        mask: Tensor,
        nodata: float | None,
        offset: Tensor,
        generator: torch.Generator,
    ) -> RawSample:
        if pixels.dtype.name not in _SMALL:
            pixels = np.where(valid, pixels, np.nan).astype(np.float32)
            nodata = None
        scaling = _scaling(self.normalisation, pixels, valid)
        # Flips know no unsigned 16 bits: they move the bits of signed ones.
        unsigned = pixels.dtype == np.uint16
        stored = torch.from_numpy(pixels.view(np.int16) if unsigned else pixels)
        image, mask = self._transformed(stored, mask, generator)
        missing = float("nan") if nodata is None else float(nodata)
        return {
            "image": image.view(torch.uint16) if unsigned else image,
            "mask": mask,
            "path": self.path_of(index),
            "low": torch.from_numpy(scaling.low),
            "inverse": torch.from_numpy(scaling.inverse),
            "nodata": torch.tensor(missing, dtype=torch.float32),
            "offset": offset,
        }

    def _transformed(
        self, image: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if self.transform is not None:
            image, mask = self.transform(image, mask, generator)
        return image.contiguous(), mask.contiguous()

    def _replaced(self, **changes: object) -> Self:
        other = copy(self)
        for key, value in changes.items():
            setattr(other, key, value)
        return other


class RawImages:
    """Values and validity of a dataset's images by index; see `ImageDataset.raw`."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        return self.dataset.read_values(index)


def _scaling(normalisation: Normalisation, values: Array, valid: npt.NDArray[np.bool_]) -> Scaling:
    if isinstance(normalisation, MeasuredNormalisation):
        return normalisation.scaling()
    if isinstance(normalisation, ImageMinMax):
        # Where some are missing, extremes are sought among floats.
        complete = bool(valid.all())
        return normalisation.scaling(
            *extremes(values if complete else values.astype(np.float32), valid)
        )
    raise TypeError(
        f"normalisation: found {type(normalisation).__name__}; expected ImageMinMax, "
        "FixedStatistics or Whitened for raw samples"
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch; what is of different sizes stays a list (masks scored at their native size)."""
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values: list[Any] = [sample[key] for sample in samples]  # type: ignore[literal-required]
        stack = key != "path" and len({tuple(value.shape) for value in values}) == 1
        batch[key] = torch.stack(values) if stack else values
    return batch  # type: ignore[return-value]


def finish(
    batch: Mapping[str, Any],
    *,
    size: tuple[int, int] | None,
    clipped: bool,
    mixing: Tensor | None = None,
) -> Batch:
    """Scale and resize the images of a batch of `RawSample`, wherever they are.

    Parameters
    ----------
    batch : of `collate`; one whose images are scaled already is returned as it is.
    size : height and width of the images of the batch; None leaves them.
    clipped : whether values are clipped to [0, 1] (`FixedStatistics`).
    mixing : weights of bands [C, C], float32, on the device of the images (`Whitened`).

    Returns
    -------
    The batch with float32 images [B, C, height, width].
    """
    if "low" not in batch:
        return batch  # type: ignore[return-value]
    scaled = [_finished(*image, size, clipped, mixing) for image in _same_size(batch)]
    return {
        "image": scaled[0] if len(scaled) == 1 else torch.cat(scaled),
        "mask": batch["mask"],
        "path": batch["path"],
    }


_Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _same_size(batch: Mapping[str, Any]) -> list[_Part]:
    """Images [B, C, H, W]; low, inverse, offset [B, C]; nodata [B]; of parts of one size each."""
    images = batch["image"]
    rest = batch["low"], batch["inverse"], batch["offset"], batch["nodata"]
    if isinstance(images, Tensor):
        return [(images, *rest)]
    return [
        (image[None], *(each[index, None] for each in rest)) for index, image in enumerate(images)
    ]


def _finished(
    image: Tensor,
    low: Tensor,
    inverse: Tensor,
    offset: Tensor,
    nodata: Tensor,
    size: tuple[int, int] | None,
    clipped: bool,
    mixing: Tensor | None,
) -> Tensor:
    values = image.to(torch.float32)
    missing = values == nodata[:, None, None, None]
    missing |= ~values.isfinite()
    values = (values - low[:, :, None, None]) * inverse[:, :, None, None]
    if clipped:
        values = values.clamp(0.0, 1.0)
    if mixing is not None:
        values = mix_bands(values.masked_fill(missing, 0.0), mixing)
    values = (values + offset[:, :, None, None]).masked_fill(missing, 0.0)
    if size is not None and tuple(values.shape[-2:]) != size:
        values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
    return values


def mix_bands(values: Tensor, mixing: Tensor) -> Tensor:
    """Each band of values [B, C, H, W] as its row of `mixing` [C, C] makes it of all bands."""
    return torch.einsum("ij,bjhw->bihw", mixing, values)
