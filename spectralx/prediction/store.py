"""What a prediction has so far, on disk, so that it goes on after any end.

Beside the output lies a hidden folder ``.<name>.partial``::

    plan.json        what is predicted, by which model, with which options; statistics; rows done
    <layer>.raw      the finished rows of each layer, rows first, no header
    lock             held while a process writes here

Rows reach the disk before ``plan.json`` counts them, and that file is replaced in one step.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spectralx.cli import InputError, write_text

Array = npt.NDArray[Any]
PLAN = "plan.json"


@dataclass(frozen=True)
class Layer:
    """One array of the output: [rows, columns], or [bands, rows, columns] for several bands.

    On disk the rows come first, so that finished rows are a prefix of the file.
    """

    name: str
    dtype: str
    bands: int
    rows: int
    columns: int

    @property
    def row_bytes(self) -> int:
        """Of one row of all bands."""
        return self.bands * self.columns * np.dtype(self.dtype).itemsize


@dataclass
class Store:
    """The folder of a prediction under way; see `open_store`.

    Attributes
    ----------
    folder : on disk.
    layers : by name.
    done : finished rows of tiles.
    noted : JSON values that belong to the plan, such as statistics.
    """

    folder: Path
    fingerprint: str
    layers: dict[str, Layer]
    done: int = 0
    noted: dict[str, Any] = field(default_factory=dict)

    def note(self, **values: Any) -> None:
        """Keep `values` with the plan."""
        self.noted |= values
        self._write_plan()

    def write(self, first: int, rows: Mapping[str, Array]) -> None:
        """Rows of every layer from row `first` on; the disk has them when this returns.

        rows : layer -> [rows, columns] or [bands, rows, columns].
        """
        for name, values in rows.items():
            layer = self.layers[name]
            ordered = values if values.ndim == 2 else values.transpose(1, 0, 2)
            content = np.ascontiguousarray(ordered, dtype=layer.dtype)
            with self.path(name).open("r+b") as stream:
                stream.seek(first * layer.row_bytes)
                stream.write(content.data)
                stream.flush()
                os.fsync(stream.fileno())

    def finish(self, done: int) -> None:
        """Count the first `done` rows of tiles as finished."""
        self.done = done
        self._write_plan()

    def rows(self, name: str, first: int, count: int) -> Array:
        """Rows of a layer as [bands, rows, columns]."""
        layer = self.layers[name]
        values = np.fromfile(
            self.path(name),
            dtype=layer.dtype,
            count=count * layer.bands * layer.columns,
            offset=first * layer.row_bytes,
        )
        return values.reshape(count, layer.bands, layer.columns).transpose(1, 0, 2)

    def path(self, name: str) -> Path:
        """File of a layer."""
        return self.folder / f"{name}.raw"

    def _write_plan(self) -> None:
        plan = {"fingerprint": self.fingerprint, "done": self.done, "noted": self.noted}
        write_text(self.folder / PLAN, json.dumps(plan, indent=2) + "\n")


def folder_of(output: Path) -> Path:
    """Where what `output` is made of lies until it is whole."""
    return output.with_name(f".{output.name}.partial")


@contextmanager
def open_store(output: Path, fingerprint: str, layers: dict[str, Layer]) -> Iterator[Store]:
    """The store of `output`: what an earlier run of the same plan left, or an empty one.

    It stays on disk when the block ends, unless with a ValueError; `discard` removes it.

    Raises
    ------
    InputError : another process writes the same output, or the disk has no room for it.
    """
    folder = folder_of(output)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{output}: found another process that writes it; expected one at a time"
            ) from None
        store = Store(folder, fingerprint, layers)
        kept = _kept_plan(folder, fingerprint)
        whole = all(store.path(name).is_file() for name in layers)
        if kept is not None and whole:
            store.done, store.noted = kept["done"], kept["noted"]
        try:
            if kept is None or not whole:
                _make_room(output, store)
            yield store
        except ValueError:
            # Input that cannot be used: there is nothing to go on with.
            discard(store)
            raise


def discard(store: Store) -> None:
    """Remove what is on disk."""
    shutil.rmtree(store.folder)


def _kept_plan(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # none yet, or cut by a crash of the machine: nothing is counted as done
    return plan if plan.get("fingerprint") == fingerprint else None


def _make_room(output: Path, store: Store) -> None:
    """Empty files for the layers, if the disk can hold them and the output made of them."""
    for old in store.folder.glob("*.raw"):
        old.unlink()
    # The rows, the same as a plain GeoTIFF, and the compressed file with its overviews.
    needed = 3 * sum(layer.rows * layer.row_bytes for layer in store.layers.values())
    free = shutil.disk_usage(store.folder).free
    if free < needed:
        raise InputError(
            f"{output}: found {free / 2**30:.1f} GiB free; expected {needed / 2**30:.1f} GiB for "
            "the map and its parts under way"
        )
    for name in store.layers:
        store.path(name).touch()
    store.finish(0)
