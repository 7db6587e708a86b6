"""Where the tiles of a scene lie, and how much each counts where they overlap.

A model gives logits on cells, `cell` pixels a side. All tiles begin on whole cells, so the logits
of overlapping tiles lie on one grid of cells and are blended there, before they are upsampled.

Tiles stand on a grid counted from the origin of the map coordinates, not from the corner of the
file: parts cut out of a scene, or neighbouring files of a mosaic, have their inner tiles in the
same places and get the same map there. A further tile at each end covers what the grid leaves over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spectralx.cli import InputError


@dataclass(frozen=True)
class Axis:
    """Tiles along the rows or the columns of a scene.

    Parameters
    ----------
    pixels : of the scene.
    cell : pixels of a cell.
    origin : where the first cell begins, in pixels of the scene; 0, or up to a cell before it.
    cells : number of cells, at least those of a tile; the last ones may reach beyond the scene.
    tile : cells of a tile.
    overlap : cells that neighbouring tiles of the grid share.
    starts : first cell of each tile, ascending; the first is 0, the last ends with the cells.
    """

    pixels: int
    cell: int
    origin: int
    cells: int
    tile: int
    overlap: int
    starts: tuple[int, ...]

    def weights(self) -> npt.NDArray[np.float32]:
        """How much a tile counts in each of its cells [tile]: 1 inside, falling to the ends.

        Over an overlap two neighbours' weights are the squares of a sine and a cosine: they add
        up to 1 and both end flat, so no step is left where a tile ends. Never 0.
        """
        ramp = np.sin(0.5 * np.pi * (np.arange(self.overlap) + 0.5) / self.overlap) ** 2
        weights = np.ones(self.tile)
        weights[: self.overlap] = ramp
        weights[self.tile - self.overlap :] *= ramp[::-1]
        return weights.astype(np.float32)

    def span(self, first: int, last: int) -> tuple[int, int]:
        """First pixel and number of pixels from tile `first` to tile `last`, beyond the scene
        included."""
        begin = self.origin + self.starts[first] * self.cell
        return begin, (self.starts[last] + self.tile - self.starts[first]) * self.cell

    def emitted(self, tile: int) -> int:
        """Cells that are settled once `tile` and all before it are added.

        The next tile's first cell is not, nor is the one before, whose upsampling looks at it.
        """
        if tile < 0:
            return 0
        if tile == len(self.starts) - 1:
            return self.cells
        return max(self.starts[tile + 1] - 1, 0)

    def restart(self, done: int) -> int:
        """First tile to be added again where the first `done` tiles have been: those from it on
        settle every cell that is left, and the one before, which upsampling looks at."""
        needed = self.emitted(done - 1) - 1
        return next(i for i, start in enumerate(self.starts) if start + self.tile > needed)


def plan_axis(pixels: int, *, tile: int, cell: int, overlap: int, offset: int = 0) -> Axis:
    """The tiles along one axis.

    Parameters
    ----------
    pixels : of the scene.
    tile : cells of a tile.
    cell : pixels of a cell.
    overlap : cells that neighbours share, 1 to half of `tile`.
    offset : the scene's first pixel, counted from where the grid of tiles begins.
    """
    if pixels <= tile * cell:
        return Axis(pixels, cell, 0, tile, tile, overlap, (0,))
    stride = tile - overlap
    origin = -(offset % cell)
    cells = -(-(pixels - origin) // cell)
    first = (offset + origin) // cell  # the scene's first cell on the grid
    last_start = cells - tile
    grid = range(-first % stride, last_start + 1, stride)
    starts = tuple(sorted({0, *grid, last_start}))
    return Axis(pixels, cell, origin, cells, tile, overlap, starts)


def map_offset(transform: Any) -> tuple[int, int]:
    """Row and column of a scene's first pixel, in pixels from the origin of its map coordinates.

    (0, 0) for scenes that are rotated. What is left of a pixel is dropped: it is the same in all
    parts of a scene, so these stay in step. A quarter is added before, because coordinates are
    commonly those of corners or of centres, and neither may fall on either side by round-off.
    """
    if transform.b or transform.d or not transform.a or not transform.e:
        return 0, 0
    row, column = transform.f / transform.e, transform.c / transform.a
    return math.floor(row + 0.25), math.floor(column + 0.25)


def whole_cells(sides: tuple[int, int], cells: tuple[int, int]) -> tuple[int, int]:
    """The whole multiples of `cells`, rows and columns of logits, that are nearest to `sides`."""
    rows, columns = (
        max(round(side / count), 1) * count for side, count in zip(sides, cells, strict=True)
    )
    return rows, columns


def tile_pixels(window: int | Sequence[int], cells: tuple[int, int]) -> tuple[int, int]:
    """Height and width in the scene of what the model sees at once.

    Parameters
    ----------
    window : side, or (height, width), in pixels of the scene.
    cells : rows and columns of the model's logits.

    Raises
    ------
    InputError : sides that are not whole cells.
    """
    sides = (window, window) if isinstance(window, int) else (window[0], window[1])
    near = whole_cells(sides, cells)
    if sides != near:
        raise InputError(
            f"window: found {sides[0]} x {sides[1]} pixels; expected multiples of the "
            f"{cells[0]} x {cells[1]} cells that the model gives logits on, for example "
            f"{near[0]} x {near[1]}"
        )
    return sides


def overlap_cells(overlap: float, tile: int) -> int:
    """Cells of a share `overlap` of a tile; at least one, so that every seam is blended.

    Raises InputError for a share outside 0 to 0.5.
    """
    if not 0 <= overlap <= 0.5:
        raise InputError(f"overlap: found {overlap}; expected 0 to 0.5 of a tile")
    return min(max(round(overlap * tile), 1), max(tile // 2, 1))
