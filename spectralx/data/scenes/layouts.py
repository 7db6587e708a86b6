"""How the files of each synthetic data set are named, divided and valued."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.io import savemat

from spectralx.data import mts12, whu_ohs
from spectralx.data.raster import write_raster

from .domains import Domain
from .landscape import COVERS
from .regions import DFC2020, MTS12_NORTH, MTS12_SOUTH, WHU_OHS

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tile:
    """A scene to draw: its domain, and where its image and labels go, below the root."""

    domain: Domain
    image: PurePosixPath
    label: PurePosixPath


@dataclass(frozen=True)
class Layout:
    """A data set: its tiles by count a domain, raw label value of each cover, label format."""

    tiles: Callable[[int], Iterator[Tile]]
    raw_values: Mapping[str, int]
    write_label: Callable[[Path, Labels, dict[str, Any]], None]

    def label_values(self, cover: Labels) -> Labels:
        """Raw label values of a map of covers; covers without one are 0."""
        return np.array([self.raw_values.get(name, 0) for name in COVERS])[cover]


_WHU_VALUES = {
    "paddy": 1, "dry farm": 2, "woodland": 3, "conifers": 3, "shrubs": 4, "orchard": 6,
    "grassland": 8, "steppe": 9, "river": 10, "lake": 11, "town": 15, "village": 16, "works": 17,
    "sand": 18, "salt flat": 20, "marsh": 21, "bare land": 22,
}  # fmt: skip
_SPLIT_SHARES = {"tr": 0.7, "val": 0.1, "ts": 0.2}


def _whu_tiles(count: int) -> Iterator[Tile]:
    for side, letter in (("source", "S"), ("target", "T")):
        folder = PurePosixPath(whu_ohs.TRANSFER_FOLDER, side)
        for number in range(count):
            yield _whu_tile(folder, letter, number)
    # Without a gap: tiles of all regions in each split.
    start = 0
    for split, share in _SPLIT_SHARES.items():
        size = max(len(WHU_OHS), round(count * share))
        for number in range(start, start + size):
            letter = "STO"[number % len(WHU_OHS)]
            yield _whu_tile(PurePosixPath(split), letter, count + number)
        start += size


def _whu_tile(folder: PurePosixPath, letter: str, number: int) -> Tile:
    name = f"{letter}{number // 3 % 4 + 1}_{number + 1:04d}.tif"
    return Tile(WHU_OHS[letter], folder / "image" / name, folder / "label" / name)


_DFC_VALUES = {
    "woodland": 1, "conifers": 1, "shrubs": 2, "orchard": 3, "grassland": 4, "steppe": 4,
    "marsh": 5, "paddy": 6, "dry farm": 6, "town": 7, "village": 7, "works": 7, "sand": 9,
    "salt flat": 9, "bare land": 9, "river": 10, "lake": 10,
}  # fmt: skip


def _dfc_tiles(count: int) -> Iterator[Tile]:
    for season, cities in DFC2020.items():
        names = list(cities)
        for number in range(count):
            city = names[number % len(names)]
            yield Tile(
                cities[city],
                _dfc_path(season, "image", "s2", city, number),
                _dfc_path(season, "label", "dfc", city, number),
            )


def _dfc_path(season: str, kind: str, sensor: str, city: str, number: int) -> PurePosixPath:
    name = f"ROIs0000_{season}_{sensor}_{city}_p{number}.tif"
    return PurePosixPath(season, kind, f"{sensor}_{city}", name)


_MTS_VALUES = {
    "dry farm": 1, "paddy": 1, "orchard": 1, "woodland": 2, "conifers": 2, "grassland": 3,
    "shrubs": 4, "steppe": 4, "river": 5, "lake": 5, "marsh": 6, "town": 7, "village": 7,
    "works": 7, "bare land": 8, "sand": 8, "salt flat": 8,
}  # fmt: skip


def _mts_tiles(count: int) -> Iterator[Tile]:
    held_out = max(2, round(0.25 * count))
    sizes = {"train": max(1, count - held_out), "val": held_out, "test": count}
    number = 0
    for split, size in sizes.items():
        for _ in range(size):
            stem = f"patch_{number:04d}"
            yield Tile(
                MTS12_SOUTH if split == "test" else MTS12_NORTH,
                PurePosixPath("image", split, f"{stem}.tif"),
                PurePosixPath("label", split, f"{stem}_label.mat"),
            )
            number += 1


def _write_tif_label(path: Path, label: Labels, georeference: dict[str, Any]) -> None:
    write_raster(path, label.astype(np.uint8), **georeference)


def _write_mat_label(path: Path, label: Labels, georeference: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    savemat(buffer, {mts12.LABEL_KEY: label.astype(np.uint8)}, do_compression=True)
    # The first 116 bytes are free text, where scipy puts the time: the same scene, the same bytes.
    header = b"MATLAB 5.0 MAT-file".ljust(116)
    path.write_bytes(header + buffer.getvalue()[len(header) :])


LAYOUTS: dict[str, Layout] = {
    "whu-ohs": Layout(_whu_tiles, _WHU_VALUES, _write_tif_label),
    "dfc2020": Layout(_dfc_tiles, _DFC_VALUES, _write_tif_label),
    "mts12": Layout(_mts_tiles, _MTS_VALUES, _write_mat_label),
}
