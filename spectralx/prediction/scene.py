"""A scene read by window: statistics of the whole, batches of tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
import torch
from torch import Tensor
from tqdm import tqdm

from spectralx.cli import refresh_seconds
from spectralx.data.normalise import ImageMinMax, Scaling, extremes
from spectralx.data.raster import OpenRaster, RasterInfo, open_raster, valid_values
from spectralx.prediction.tiles import Axis

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]

# Bytes of pixels that the statistics read at a time.
_STATISTICS_BYTES = 16 * 2**20
# Least and most bytes of blocks that GDAL keeps: those of one row of tiles, where they fit.
_CACHE_BYTES = (32 * 2**20, 448 * 2**20)
# Types whose values float32 holds exactly, so that the device can tell nodata by itself.
EXACT_DTYPES = ("uint8", "int8", "uint16", "int16", "float32")


@dataclass(frozen=True)
class SceneReading:
    """What to read of a scene.

    Attributes
    ----------
    info : its header.
    bands : of the scene, from 0, in the model's order.
    nodata : value of missing pixels, or None.
    """

    info: RasterInfo
    bands: tuple[int, ...]
    nodata: float | None

    @property
    def may_miss(self) -> bool:
        """Whether a pixel can be missing at all."""
        return self.nodata is not None or self.info.dtype.startswith("float")


@dataclass(frozen=True)
class TileBatch:
    """Tiles of one row of tiles that hold a valid pixel.

    Attributes
    ----------
    row : of the tiles.
    columns : of each tile.
    passed : tiles that this batch settles, those without a valid pixel included.
    pixels : [B, C, H, W] in the file's type, or float32 with NaN for missing values; None for none.
    first_column : of `valid`, in pixels of the scene.
    valid : [rows, columns], whether any band is valid; None where all are.
    """

    row: int
    columns: tuple[int, ...]
    passed: int
    pixels: Tensor | None
    first_column: int
    valid: Bools | None


def scene_scaling(reading: SceneReading, *, name: str, progress: bool) -> Scaling:
    """Each band to [0, 1] by its extremes over the whole scene, read once by window."""
    info, bands = reading.info, list(reading.bands)
    low = np.full(len(bands), np.inf, dtype=np.float32)
    high = -low
    with open_raster(info.path) as raster, block_cache(raster, rows=1):
        windows = _windows(raster)
        with tqdm(
            windows,
            desc=f"{name} statistics",
            unit="window",
            disable=not progress,
            mininterval=refresh_seconds(),
        ) as bar:
            for window in bar:
                raw = raster.read(bands=bands, window=window)
                valid = valid_values(raw, reading.nodata)
                lowest, highest = extremes(raw.astype(np.float32), valid)
                low, high = np.minimum(low, lowest), np.maximum(high, highest)
    return ImageMinMax.scaling(low, high)


def _windows(raster: OpenRaster) -> list[tuple[int, int, int, int]]:
    """Windows of whole blocks that cover a scene."""
    info = raster.info
    block_rows, block_columns = raster.source.block_shapes[0]
    pixels = _STATISTICS_BYTES // (info.bands * np.dtype(info.dtype).itemsize)
    columns = min(max(pixels // block_rows // block_columns, 1) * block_columns, info.width)
    rows = min(max(pixels // columns // block_rows, 1) * block_rows, info.height)
    return [
        (row, column, min(rows, info.height - row), min(columns, info.width - column))
        for row in range(0, info.height, rows)
        for column in range(0, info.width, columns)
    ]


@contextmanager
def block_cache(raster: OpenRaster, *, rows: int) -> Iterator[None]:
    """GDAL's cache just large enough for the blocks under `rows` rows of a scene, within limits.

    By default it grows to a share of the machine's memory.
    """
    block_rows, block_columns = raster.source.block_shapes[0]
    info = raster.info
    deep = (math.ceil(rows / block_rows) + 1) * block_rows
    wide = math.ceil(info.width / block_columns) * block_columns
    least, most = _CACHE_BYTES
    wanted = deep * wide * info.bands * np.dtype(info.dtype).itemsize
    with rasterio.Env(GDAL_CACHEMAX=min(max(wanted, least), most)):
        yield


def read_tiles(
    reading: SceneReading,
    rows: Axis,
    columns: Axis,
    *,
    first_row: int,
    batch_size: int,
    pin: bool = False,
) -> Iterator[TileBatch]:
    """All tiles from row of tiles `first_row` on, row by row, up to `batch_size` at a time.

    Where a tile reaches beyond the scene the pixels are mirrored. Tiles without a valid pixel are
    left out. `pin` puts them into page-locked memory, for a GPU.
    """
    count = len(columns.starts)
    with open_raster(reading.info.path) as raster, block_cache(raster, rows=rows.span(0, 0)[1]):
        for row in range(first_row, len(rows.starts)):
            for first in range(0, count, batch_size):
                last = min(first + batch_size, count) - 1
                batch = _read_batch(raster, reading, rows, columns, row, first, last)
                if pin and batch.pixels is not None:
                    batch = replace(batch, pixels=batch.pixels.pin_memory())
                yield batch


def _read_batch(
    raster: OpenRaster,
    reading: SceneReading,
    rows: Axis,
    columns: Axis,
    row: int,
    first: int,
    last: int,
) -> TileBatch:
    raw, inside = _read_mirrored(raster, reading, rows.span(row, row), columns.span(first, last))
    valid: Bools | None = None
    kept = range(first, last + 1)
    begin = columns.span(first, first)[0]
    places = [columns.span(tile, tile)[0] - begin for tile in kept]
    width = columns.tile * columns.cell
    if reading.may_miss:
        values = valid_values(raw, reading.nodata)
        valid = np.asarray(values.any(axis=0))
        if reading.info.dtype not in EXACT_DTYPES:
            raw = np.where(values, raw, np.nan).astype(np.float32)
        shown = [bool(valid[:, place : place + width].any()) for place in places]
        kept_places = [place for place, one in zip(places, shown, strict=True) if one]
        columns_kept = tuple(tile for tile, one in zip(kept, shown, strict=True) if one)
    else:
        if reading.info.dtype not in EXACT_DTYPES:
            raw = raw.astype(np.float32)
        kept_places, columns_kept = places, tuple(kept)
    pixels = None
    if kept_places:
        tiles = [raw[:, :, place : place + width] for place in kept_places]
        pixels = torch.from_numpy(np.stack(tiles))
    return TileBatch(
        row,
        columns_kept,
        last + 1 - first,
        pixels,
        max(begin, 0),
        None if valid is None else valid[inside],
    )


def _read_mirrored(
    raster: OpenRaster, reading: SceneReading, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[Array, tuple[slice, slice]]:
    """Pixels [C, rows, columns] of a window that may reach beyond the scene; where it does not."""
    window: list[int] = []
    beyond: list[tuple[int, int]] = []
    inside: list[slice] = []
    for (begin, size), whole in zip(
        (rows, columns), (reading.info.height, reading.info.width), strict=True
    ):
        start, stop = max(begin, 0), min(begin + size, whole)
        window += [start, stop - start]
        beyond.append((start - begin, begin + size - stop))
        inside.append(slice(start - begin, stop - begin))
    area = (window[0], window[2], window[1], window[3])
    raw = raster.read(bands=reading.bands, window=area)
    if any(map(any, beyond)):
        raw = np.pad(raw, [(0, 0), *beyond], mode="symmetric")
    return raw, (inside[0], inside[1])
