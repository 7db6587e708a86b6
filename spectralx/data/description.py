"""A data set of one's own, described by a short YAML file: what is where, and what it means.

The README in this folder has every key. Paths are below ``root``, which is below the file's own
folder. Nothing of the data is read here but which files there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from .folder import SHARES, SPLITS, pairs_of_csv
from .raster import SUFFIXES, data_error
from .tiles import Pair, split_by_file, tiled

Division = Literal["files", "tiles"]

DESCRIPTION_SUFFIXES = (".yaml", ".yml")
_LABEL_FIELDS = ("{stem}", "{name}", "{folder}")


@dataclass(frozen=True)
class Domain:
    """Files that belong together: images, their labels, and how they are divided.

    Attributes
    ----------
    images : patterns below the root, such as ``north/*.tif``; none where `splits` are CSV files.
    labels : the file of an image's labels, with ``{stem}``, ``{name}`` or ``{folder}`` of it.
    splits : "train", "validation", "test" -> a CSV file (columns image, mask) or patterns; none
        divides by a checksum of the path.
    """

    images: tuple[str, ...] = ()
    labels: str | None = None
    splits: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """What a YAML file says of a data set; see the README of this folder.

    Attributes
    ----------
    path : of the YAML file.
    root : folder of the data.
    domains : by name, the source first. One without a name where the file knows no domains.
    class_names : from 1 on; index 0, "unlabelled", is not among them.
    label_values : raw label -> class; None where raw labels are the classes.
    unknown_labels : class of other raw labels, 0; None makes them errors.
    bands : of the files to use, counted from 1; None uses all.
    wavelengths : of all bands of the files, µm; None takes them from the files.
    nodata : of images that state none.
    tile, stride : windows of large images, pixels; None reads images whole.
    divide : "files" or "tiles": what is divided where no splits are given.
    manifest : file of checksums.
    verify : hold each file to its checksum when it is first read.
    """

    path: Path
    root: Path
    domains: Mapping[str, Domain]
    class_names: tuple[str, ...]
    label_values: Mapping[int, int] | None = None
    unknown_labels: int | None = None
    bands: tuple[int, ...] | None = None
    wavelengths: tuple[float, ...] | None = None
    nodata: float | None = None
    tile: int | None = None
    stride: int | None = None
    divide: Division = "files"
    manifest: Path = Path()
    verify: bool = False

    def splits(self, domain: str) -> dict[str, list[Pair]]:
        """Whole files of a domain by split; with "all" alone where they are divided as tiles.

        Raises DataError for patterns without files, missing labels, files in two splits.
        """
        part = self.domains[domain]
        where = f"{self.path}: {domain}" if domain else str(self.path)
        if part.splits:
            found = {
                split: self._pairs_of(part, split, what, where)
                for split, what in part.splits.items()
            }
            _check_apart(where, found)
            return found
        pairs = self._match(part, part.images, where)
        if self.divide == "tiles":
            return {"all": pairs}
        parts = split_by_file(pairs, SHARES, root=self.root, name=where)
        return dict(zip(SPLITS, parts, strict=True))

    def every(self, domain: str) -> list[Pair]:
        """All files of a domain."""
        return [pair for pairs in self.splits(domain).values() for pair in pairs]

    def pairs(self, domain: str, *, target: bool = False) -> dict[str, list[Pair]]:
        """What is read of a domain, by split: files, or windows of them.

        A `target` has one split, "test": all of it, or its own where it names one.
        """
        files = self.splits(domain)
        if target:
            chosen = files.get("test") if self.domains[domain].splits else None
            files = {"test": chosen or self.every(domain)}
        size = self.tile
        if size is None:
            return files
        if "all" in files:
            windows = tiled(files["all"], size, size, once=True)
            parts = split_by_file(windows, SHARES, root=self.root, name=str(self.path))
            return dict(zip(SPLITS, parts, strict=True))
        return {
            split: tiled(
                pairs,
                size,
                self.stride or size if split == "train" else size,
                once=split != "train",
            )
            for split, pairs in files.items()
        }

    def _pairs_of(
        self, part: Domain, split: str, what: str | tuple[str, ...], where: str
    ) -> list[Pair]:
        if isinstance(what, str):
            return pairs_of_csv(self.root, self.root / what)
        return self._match(part, what, f"{where}: {split}")

    def _match(self, part: Domain, patterns: Sequence[str], where: str) -> list[Pair]:
        if part.labels is None:
            raise data_error(where, "no labels", "a pattern such as labels/{stem}.tif")
        found: dict[Path, Path] = {}
        for pattern in patterns:
            images = sorted(
                path for path in self.root.glob(pattern) if path.suffix.lower() in SUFFIXES
            )
            if not images:
                raise data_error(where, f"no GeoTIFF {self.root / pattern}", "at least one")
            for image in images:
                found[image] = self._label_of(image, part.labels)
        return [Pair(image, label) for image, label in sorted(found.items())]

    def _label_of(self, image: Path, pattern: str) -> Path:
        folder = image.parent.relative_to(self.root).as_posix()
        fields = {"{stem}": image.stem, "{name}": image.name, "{folder}": folder}
        for field, value in fields.items():
            pattern = pattern.replace(field, value)
        return self.root / pattern


def is_description(name: str) -> bool:
    """Whether `name` is that of a YAML file, and not of a task."""
    return name.lower().endswith(DESCRIPTION_SUFFIXES)


def read_description(path: str | Path) -> Description:
    """The description in a YAML file.

    Raises
    ------
    DataError : no such file, not YAML, unknown keys, or values that do not fit; one line.
    """
    file = Path(path)
    if not file.is_file():
        raise data_error(file, "no such file", "a YAML file that describes a data set")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise data_error(file, f"no YAML ({error})", "a description of a data set") from error
    return _Reading(file, values).description()


class _Reading:
    """Values of a YAML file, each checked as it is taken."""

    KEYS = (
        "root", "images", "labels", "splits", "domains", "source", "classes", "unknown_labels",
        "bands", "wavelengths", "nodata", "tile", "stride", "divide", "manifest", "verify",
    )  # fmt: skip

    def __init__(self, file: Path, values: Any) -> None:
        self.file = file
        self.values = self.mapping("the file", values, self.KEYS)

    def error(self, key: str, found: object, expected: str) -> Exception:
        return data_error(f"{self.file}: {key}", str(found), expected)

    def mapping(self, key: str, value: Any, keys: Sequence[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            raise self.error(key, repr(value), "keys and values")
        for name in value:
            if keys is not None and name not in keys:
                raise self.error(key, f"unknown key {name!r}", f"one of {', '.join(keys)}")
        return value

    def texts(self, key: str, value: Any) -> tuple[str, ...]:
        """One text, or several."""
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed or not all(_is_text(x) for x in listed):
            raise self.error(key, repr(value), "a text, or a list of them")
        for text in listed:
            self.inside(key, text)
        return tuple(listed)

    def inside(self, key: str, text: Any) -> str:
        """A path or pattern below the root."""
        if not _is_text(text) or Path(text).is_absolute() or ".." in Path(text).parts:
            raise self.error(key, repr(text), "a path below the root")
        return str(text)

    def description(self) -> Description:
        values, folder = self.values, self.file.parent
        root = folder / str(values.get("root", "."))
        if not root.is_dir():
            raise self.error("root", f"no folder {root}", "the folder of the data")
        names, label_values = self.classes(values.get("classes"))
        tile = self.number("tile", int)
        stride = self.number("stride", int)
        if stride is not None and (tile is None or stride > tile):
            raise self.error("stride", stride, f"no more than tile, {tile}")
        manifest = folder / str(values.get("manifest", f"{self.file.stem}.sha256"))
        return Description(
            path=self.file,
            root=root,
            domains=self.domains(),
            class_names=names,
            label_values=label_values,
            unknown_labels=self.unknown_labels(label_values),
            bands=self.numbers("bands", int),
            wavelengths=self.numbers("wavelengths", float),
            nodata=self.number("nodata", float, positive=False),
            tile=tile,
            stride=stride,
            divide=self.division(tile),
            manifest=manifest,
            verify=self.truth("verify"),
        )

    def domains(self) -> dict[str, Domain]:
        values = self.values
        own: dict[str, Any] = {
            key: values[key] for key in ("images", "labels", "splits") if key in values
        }
        if "domains" not in values:
            if "source" in values:
                raise self.error("source", values["source"], "no source without domains")
            return {"": self.domain("", own)}
        if "images" in own or "splits" in own:
            raise self.error(
                "domains",
                f"{'images' if 'images' in own else 'splits'} beside it",
                "these inside each domain",
            )
        listed = self.mapping("domains", values["domains"])
        found = {
            str(name): self.domain(
                f"domains.{name}",
                own | self.mapping(f"domains.{name}", value, ("images", "labels", "splits")),
            )
            for name, value in listed.items()
        }
        source = str(values.get("source", next(iter(found))))
        if source not in found:
            raise self.error("source", repr(source), f"one of {', '.join(found)}")
        return {source: found.pop(source), **found}

    def domain(self, key: str, values: Mapping[str, Any]) -> Domain:
        before = f"{key}." if key else ""
        labels = values.get("labels")
        if labels is not None:
            self.inside(f"{before}labels", labels)
            if not any(field in labels for field in _LABEL_FIELDS):
                raise self.error(
                    f"{before}labels", repr(labels), f"one of {', '.join(_LABEL_FIELDS)} in it"
                )
        splits: dict[str, str | tuple[str, ...]] = {}
        if "splits" in values:
            for split, what in self.mapping(f"{before}splits", values["splits"], SPLITS).items():
                name = f"{before}splits.{split}"
                is_table = isinstance(what, str) and what.lower().endswith(".csv")
                splits[split] = self.inside(name, what) if is_table else self.texts(name, what)
        if ("images" in values) == bool(splits):
            raise self.error(
                key or "images",
                "both images and splits" if splits else "neither images nor splits",
                "one of them",
            )
        images = self.texts(f"{before}images", values["images"]) if "images" in values else ()
        return Domain(images, labels, splits)

    def classes(self, value: Any) -> tuple[tuple[str, ...], dict[int, int] | None]:
        """Names from 1 on, and raw label -> class if they are given by raw label."""
        if isinstance(value, list) and value and all(_is_text(name) for name in value):
            return tuple(value), None
        if not isinstance(value, dict) or not value:
            raise self.error("classes", repr(value), "a list of names, or raw label: name")
        names: list[str] = []
        mapping: dict[int, int] = {}
        for raw, name in value.items():
            if type(raw) is not int or not (name is None or _is_text(name)):
                raise self.error("classes", f"{raw!r}: {name!r}", "whole number: name, or null")
            if name is None:
                mapping[raw] = 0
                continue
            if name not in names:
                names.append(name)
            mapping[raw] = names.index(name) + 1
        if not names:
            raise self.error("classes", "no name", "at least one")
        return tuple(names), mapping

    def unknown_labels(self, label_values: Mapping[int, int] | None) -> int | None:
        value = self.values.get("unknown_labels", "error")
        if value not in ("error", "unlabelled"):
            raise self.error("unknown_labels", repr(value), "error or unlabelled")
        if value == "unlabelled" and label_values is None:
            raise self.error("unknown_labels", value, "classes given by raw label")
        return 0 if value == "unlabelled" else None

    def division(self, tile: int | None) -> Division:
        value = self.values.get("divide", "files")
        if value not in get_args(Division):
            raise self.error("divide", repr(value), f"one of {', '.join(get_args(Division))}")
        if value == "tiles" and tile is None:
            raise self.error("divide", value, "tile: the side of a window")
        return value  # type: ignore[no-any-return]

    def truth(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, repr(value), "true or false")
        return value

    def number(self, key: str, kind: type, *, positive: bool = True) -> Any:
        value = self.values.get(key)
        return None if value is None else self._number(key, value, kind, positive)

    def numbers(self, key: str, kind: type) -> tuple[Any, ...] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise self.error(key, repr(value), "a list of numbers")
        return tuple(self._number(key, each, kind, True) for each in value)

    def _number(self, key: str, value: Any, kind: type, positive: bool) -> Any:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fits or (kind is int and value != int(value)) or (positive and value <= 0):
            name = "whole number" if kind is int else "number"
            raise self.error(key, repr(value), f"a {'positive ' if positive else ''}{name}")
        return kind(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _check_apart(where: str, splits: Mapping[str, Sequence[Pair]]) -> None:
    """No image is in two splits."""
    seen: dict[Path, str] = {}
    for split, pairs in splits.items():
        for pair in pairs:
            other = seen.setdefault(pair.image, split)
            if other != split:
                raise data_error(
                    f"{where}: splits", f"{pair.image} in {other} and {split}", "it in one of them"
                )
