"""Whether a described data set holds what its description says, file by file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spectralx.cli import one_line, refresh_seconds

from .checksums import Checksums, resolved
from .description import Description
from .domains import kept_bands
from .folder import SPLITS, stated_wavelengths
from .labels import to_classes
from .raster import (
    DataError,
    PixelWindow,
    RasterInfo,
    data_error,
    raster_info,
    read_label,
    read_stored,
    valid_values,
)
from .tiles import Pair

# Pixels are read in strips of about so many bytes.
_STRIP_BYTES = 2**26
SAME_BAND = 0.03  # µm between what a file states and what the description says
SCALE_RATIO = 50.0  # of an image's values to those of the others


@dataclass
class Report:
    """What `check` found.

    Attributes
    ----------
    problems : one line each: the file, what was found, what is expected.
    summary : counts and statistics, line by line.
    """

    problems: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)


@dataclass
class _Image:
    """What was measured of one image and its labels."""

    info: RasterInfo
    labelled: Counter[int]
    count: np.ndarray  # valid values of each band
    mean: np.ndarray


class _Check:
    def __init__(self, description: Description) -> None:
        self.description = description
        self.report = Report()
        self.wavelengths = description.wavelengths

    def note(self, error: Exception) -> None:
        self.report.problems.append(one_line(error))

    def run(self, progress: bool) -> Report:
        splits = self.splits()
        pairs = {pair.image: pair for part in splits.values() for pair in part}
        measured: dict[Path, _Image] = {}
        bar = tqdm(
            pairs.values(), desc="check", unit="image", disable=not progress,
            mininterval=refresh_seconds(),
        )  # fmt: skip
        checksums = self.checksums()
        for pair in bar:
            try:
                if checksums is not None:
                    checksums.verify(pair.image)
                    checksums.verify(pair.label)
                measured[pair.image] = self.measure(pair)
            except DataError as error:
                self.note(error)
        self.compare(measured)
        if checksums is not None:
            self.tables(checksums)
            held = {path for pair in pairs.values() for path in pair[:2]}
            known = {resolved(path) for path in held | tables_of(self.description)}
            for path in sorted({*checksums.expected} - known):
                self.note(data_error(path, "a checksum but no place in the data", "none"))
        self.summarise(splits, measured)
        return self.report

    def splits(self) -> dict[tuple[str, str], list[Pair]]:
        found: dict[tuple[str, str], list[Pair]] = {}
        seen: dict[Path, str] = {}
        source = next(iter(self.description.domains))
        for domain in self.description.domains:
            try:
                parts = self.description.splits(domain)
            except DataError as error:
                self.note(error)
                continue
            for split, pairs in parts.items():
                found[domain, split] = pairs
                for pair in pairs:
                    other = seen.setdefault(pair.image, domain)
                    if other != domain:
                        self.note(
                            data_error(pair.image, f"it in {other} and {domain}", "one domain")
                        )
            absent = [split for split in SPLITS if not parts.get(split) and "all" not in parts]
            if domain == source and absent:
                self.note(
                    data_error(
                        f"{self.description.path}: splits",
                        f"no {', no '.join(absent)}" + (f" of {domain}" if domain else ""),
                        f"each of {', '.join(SPLITS)}",
                    )
                )
        return found

    def checksums(self) -> Checksums | None:
        path = self.description.manifest
        if not path.is_file() and not self.description.verify:
            return None
        try:
            return Checksums.read(path)
        except DataError as error:
            self.note(error)
            return None

    def tables(self, checksums: Checksums) -> None:
        for table in sorted(tables_of(self.description)):
            try:
                checksums.verify(table)
            except DataError as error:
                self.note(error)

    def measure(self, pair: Pair) -> _Image:
        """Read an image and its labels, strip by strip."""
        image, label = pair.image, pair.label
        if not label.is_file():
            raise data_error(image, f"no label {label}", "a label for each image")
        info, label_info = raster_info(image), raster_info(label)
        if self.wavelengths is None:
            self.wavelengths = stated_wavelengths(image)
        self.headers(info, label_info)
        bands = kept_bands(self.description, info.bands)
        found = _Image(
            info,
            Counter(),
            np.zeros(info.bands if bands is None else len(bands)),
            np.zeros(info.bands if bands is None else len(bands)),
        )
        names = len(self.description.class_names) + 1
        for window in strips(info):
            pixels, nodata = read_stored(
                image, bands=bands, nodata=self.description.nodata, window=window
            )
            valid = valid_values(pixels, nodata)
            count = valid.sum((1, 2))
            total = found.count + count
            sums = np.where(valid, pixels, 0).sum((1, 2), dtype=np.float64)
            found.mean = (found.mean * found.count + sums) / np.maximum(total, 1)
            found.count = total
            raw = read_label(label, window)
            classes = to_classes(
                label, raw, names, self.description.label_values, self.description.unknown_labels
            )
            values, counts = np.unique(classes, return_counts=True)
            found.labelled.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if not found.count.any():
            raise data_error(image, "no valid value", "pixels that are not nodata")
        return found

    def headers(self, info: RasterInfo, label: RasterInfo) -> None:
        assert self.wavelengths is not None
        count = len(self.wavelengths)
        if info.bands != count:
            raise data_error(info.path, f"{info.bands} bands", f"{count}, as many as wavelengths")
        if (label.height, label.width) != (info.height, info.width):
            raise data_error(
                label.path,
                f"{label.height}x{label.width} pixels",
                f"{info.height}x{info.width}, the size of {info.path}",
            )
        if info.wavelengths is not None:
            off = [abs(a - b) for a, b in zip(info.wavelengths, self.wavelengths, strict=True)]
            worst = off.index(max(off))
            if off[worst] > SAME_BAND:
                self.note(
                    data_error(
                        info.path,
                        f"band {worst + 1} at {info.wavelengths[worst]:g} um",
                        f"{self.wavelengths[worst]:g}, as in the description",
                    )
                )
        if info.crs is not None and label.crs is not None:
            if label.crs != info.crs:
                self.note(data_error(label.path, f"CRS {label.crs}", f"{info.crs}, its image's"))
            elif not label.transform.almost_equals(info.transform, 1e-6):
                self.note(
                    data_error(
                        label.path,
                        f"upper left {_corner(label)}, pixel {_pixel(label)}",
                        f"{_corner(info)}, {_pixel(info)}, its image's",
                    )
                )

    def compare(self, measured: dict[Path, _Image]) -> None:
        """What holds of most files must hold of all: CRS, type, scale of values."""
        if not measured:
            return
        images = measured.values()
        self.differing(measured, "CRS", {p: str(i.info.crs) for p, i in measured.items()})
        self.differing(measured, "type", {p: i.info.dtype for p, i in measured.items()})
        scales = {p: float(np.abs(i.mean[i.count > 0]).mean()) for p, i in measured.items()}
        usual = float(np.median([*scales.values()]))
        for path, scale in scales.items():
            ratio = scale / usual if usual > 0 else 1.0
            if ratio > SCALE_RATIO or ratio < 1 / SCALE_RATIO:
                self.note(
                    data_error(
                        path,
                        f"values of {scale:.3g} on average",
                        f"about {usual:.3g}, as in most images",
                    )
                )
        empty = np.sum([image.count for image in images if len(image.count)], axis=0) == 0
        numbers = self.description.bands or range(1, len(empty) + 1)
        for band in np.flatnonzero(empty):
            self.note(
                data_error(
                    self.description.path,
                    f"no valid value of band {numbers[band]} in any image",
                    "some, or bands without it",
                )
            )

    def differing(self, measured: dict[Path, _Image], what: str, values: dict[Path, str]) -> None:
        usual = Counter(values.values()).most_common(1)[0][0]
        for path, value in values.items():
            if value != usual:
                self.note(data_error(path, f"{what} {value}", f"{usual}, as in most images"))

    def summarise(
        self, splits: dict[tuple[str, str], list[Pair]], measured: dict[Path, _Image]
    ) -> None:
        names = ("unlabelled", *self.description.class_names)
        lines = self.report.summary
        for (domain, split), pairs in splits.items():
            labelled: Counter[int] = Counter()
            for pair in pairs:
                if pair.image in measured:
                    labelled.update(measured[pair.image].labelled)
            total = max(sum(labelled.values()), 1)
            shares = ", ".join(
                f"{name} {100 * labelled[index] / total:.1f} %" for index, name in enumerate(names)
            )
            where = " ".join(part for part in (domain, split) if part)
            lines.append(f"{where}: {len(pairs)} images; {shares}")
        if measured and self.wavelengths is not None:
            count = np.sum([each.count for each in measured.values()], axis=0)
            mean = np.sum([each.mean * each.count for each in measured.values()], axis=0)
            mean = mean / np.maximum(count, 1)
            bands = kept_bands(self.description, len(self.wavelengths))
            kept = range(len(self.wavelengths)) if bands is None else bands
            shown = (f"{self.wavelengths[b]:g} um {m:.4g}" for b, m in zip(kept, mean, strict=True))
            lines.append(f"mean of each band: {', '.join(shown)}")


def check(description: Description, *, progress: bool = False) -> Report:
    """Read every file of a data set and hold it against the description.

    Looked at: that files are there and whole; bands, sizes, types, CRS and place of images and
    labels; wavelengths that files state; labels outside the classes; images without valid values or
    of another scale; images in two splits or domains; checksums where there is a manifest.

    Parameters
    ----------
    description : of `spectralx.data.description.read_description`.
    progress : show a progress bar on stderr.
    """
    return _Check(description).run(progress)


def files_of(description: Description) -> list[Path]:
    """All images and labels of a data set, each once, and the tables of its splits."""
    found = tables_of(description)
    for name in description.domains:
        found |= {path for pair in description.every(name) for path in pair[:2]}
    return sorted(found)


def tables_of(description: Description) -> set[Path]:
    """The CSV files of its splits."""
    return {
        description.root / table
        for domain in description.domains.values()
        for table in domain.splits.values()
        if isinstance(table, str)
    }


def strips(info: RasterInfo) -> Iterator[PixelWindow]:
    """Windows of whole rows over an image, each of bounded size."""
    row_bytes = info.bands * info.width * np.dtype(info.dtype).itemsize
    rows = max(1, math.floor(_STRIP_BYTES / max(row_bytes, 1)))
    for row in range(0, info.height, rows):
        yield row, 0, min(rows, info.height - row), info.width


def _corner(info: RasterInfo) -> str:
    return f"({info.transform.c:g}, {info.transform.f:g})"


def _pixel(info: RasterInfo) -> str:
    return f"{info.transform.a:g} x {-info.transform.e:g}"
