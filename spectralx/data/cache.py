"""Stored samples kept in memory, or decoded on a fast disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .raster import data_error
from .samples import Stored
from .tiles import TileDataset

logger = logging.getLogger(__name__)

# Changes whenever what a file holds does.
_FORMAT = 1


class MemoryCache:
    """Every sample that was read, as stored."""

    def __init__(self) -> None:
        self._kept: dict[int, Stored] = {}

    def get(self, index: int) -> Stored | None:
        return self._kept.get(index)

    def put(self, index: int, stored: Stored) -> None:
        self._kept[index] = stored


class DiskCache:
    """Decoded samples of a dataset in a folder, one safetensors file each.

    A file is named by a hash of what its sample is made of: paths, sizes and times of change of
    image and labels, window, bands, nodata value, classes and offset of labels. Whatever
    changes makes another file; old ones may be deleted at any time. Files are replaced in one step,
    so any number of processes may share the folder. One that is damaged is said and made anew.

    Parameters
    ----------
    folder : made where it does not exist.
    dataset : whose samples these are.
    """

    def __init__(self, folder: str | Path, dataset: TileDataset) -> None:
        self.folder = Path(folder)
        self.dataset = dataset

    def path_of(self, index: int) -> Path:
        """The file of sample `index`."""
        text = json.dumps([_FORMAT, self._identity(index)])
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _identity(self, index: int) -> list[Any]:
        dataset, pair = self.dataset, self.dataset.pairs[index]
        files = [(os.path.abspath(path), *_state(path)) for path in (pair.image, pair.label)]
        mapping = sorted((dataset.label_values or {}).items())
        reader = dataset.label_reader
        return [
            files,
            pair.window,
            pair.repeated,
            dataset.keep_bands,
            repr(dataset.nodata),
            dataset.label_values is None,
            mapping,
            dataset.other_labels,
            dataset.num_classes,
            dataset.label_offset,
            f"{reader.__module__}.{reader.__qualname__}",
        ]

    def get(self, index: int) -> Stored | None:
        path = self.path_of(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as opened:
                pixels, classes = opened.get_tensor("pixels"), opened.get_tensor("classes")
                nodata = (opened.metadata() or {}).get("nodata")
        except (SafetensorError, OSError) as error:
            logger.warning("%s: damaged (%s), made anew", path, error)
            return None
        return Stored(pixels, classes, None if nodata is None else float(nodata))

    def put(self, index: int, stored: Stored) -> None:
        path = self.path_of(index)
        metadata = None if stored.nodata is None else {"nodata": repr(float(stored.nodata))}
        largest = np.min_scalar_type(int(stored.classes.max(initial=0)))
        tensors = {
            "pixels": np.ascontiguousarray(stored.pixels),
            "classes": np.ascontiguousarray(stored.classes.astype(largest)),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as scratch:
                part = Path(scratch, "sample")
                save_file(tensors, part, metadata)
                os.replace(part, path)
        except (SafetensorError, OSError) as error:
            raise data_error(
                self.folder,
                f"no way to write {path.name} ({error})",
                "a folder to write to with room for the images, or no cache",
            ) from error


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
