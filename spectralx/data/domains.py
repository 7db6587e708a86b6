"""The files a task is made of, before they are scaled and augmented."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .checksums import Checksums
from .description import Description, read_description
from .folder import SPLITS, stated_wavelengths
from .raster import data_error, first_readable
from .samples import UNLABELLED, ImageDataset
from .tiles import Pair, TileDataset


@dataclass(frozen=True)
class Domains:
    """Datasets of a source domain, and of others to test on.

    Attributes
    ----------
    source : its train, validation and test.
    targets : by name.
    """

    source: Sequence[ImageDataset]
    targets: Mapping[str, ImageDataset] = field(default_factory=dict)


def described_domains(path: str | Path) -> Domains:
    """The datasets that a YAML file describes; see :mod:`spectralx.data.description`.

    Raises DataError for a file that does not fit, or data that are not there.
    """
    found = read_description(path)
    source, *targets = found.domains
    parts = found.pairs(source)
    missing = [split for split in SPLITS if not parts.get(split)]
    if missing:
        raise data_error(f"{path}: splits", f"no {missing[0]}", f"each of {', '.join(SPLITS)}")
    first = _dataset(found, parts["train"], _name(found, source, "train"))
    rest = [first.subset(parts[split], name=_name(found, source, split)) for split in SPLITS[1:]]
    others = {
        name: _dataset(found, found.pairs(name, target=True)["test"], _name(found, name, "test"))
        for name in targets
    }
    return Domains((first, *rest), others)


def _name(description: Description, domain: str, split: str) -> str:
    return " ".join(part for part in (description.path.stem, domain, split) if part)


def _dataset(description: Description, pairs: list[Pair], name: str) -> TileDataset:
    wavelengths = description.wavelengths or first_readable(
        stated_wavelengths, [pair.image for pair in pairs]
    )
    return TileDataset(
        pairs,
        name=name,
        wavelengths=wavelengths,
        class_names=[UNLABELLED, *description.class_names],
        label_values=description.label_values,
        other_labels=description.unknown_labels,
        keep_bands=kept_bands(description, len(wavelengths)),
        nodata=description.nodata,
        checksums=Checksums.read(description.manifest) if description.verify else None,
    )


def kept_bands(description: Description, count: int) -> list[int] | None:
    """Indices, from 0, of the bands to use of `count`; None for all.

    Raises DataError where one is not there.
    """
    if description.bands is None:
        return None
    outside = [band for band in description.bands if band > count]
    if outside:
        raise data_error(f"{description.path}: bands", str(outside[0]), f"1 to {count}")
    return [band - 1 for band in description.bands]
