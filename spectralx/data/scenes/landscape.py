"""Maps of land covers: zones of farmland, open land and towns, with rivers, lakes and roads.

The plane is divided into zones (cells of a Voronoi diagram with fractal borders), each filled by
its kind: parcels of fields, patches cut from fractal noise, or blocks between streets. Several
covers are made of the same materials and differ by shape and neighbourhood alone: rivers and lakes,
towns and villages, woods and orchards, the parks of a town and grassland. Lengths are in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.fft import fftfreq, irfft2, next_fast_len, rfft2, rfftfreq
from scipy.spatial import cKDTree

Field = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Rng = np.random.Generator

COVERS = (
    "paddy", "dry farm", "woodland", "conifers", "orchard", "shrubs", "grassland", "steppe",
    "marsh", "river", "lake", "town", "village", "works", "sand", "salt flat", "bare land",
)  # fmt: skip
COVER = {name: index for index, name in enumerate(COVERS)}
ZONES = ("paddies", "farmland", "orchards", "woods", "conifers", "meadows", "scrub", "marsh",
         "barrens", "sands", "salt", "town", "works")  # fmt: skip

ZONE_SPACING = 40.0
_FARM_SPACING = 30.0
UNSURVEYED = 0.03


@dataclass(frozen=True)
class Landscape:
    """A scene before light falls on it, all maps [size, size].

    cover : index into `COVERS`.
    unit : number of the field, patch or block a pixel belongs to.
    ground : surface laid over the cover: 0 none, or `ROAD`, `TRACK`, `PARK`, `ROOF`, `POND`.
    height : relief, standard deviation 1.
    rows : -1 to 1, plant rows of fields and orchards.
    surveyed : False where the label map has no entry.
    """

    cover: Labels
    unit: Labels
    ground: Labels
    height: Field
    rows: Field
    surveyed: npt.NDArray[np.bool_]


ROAD, TRACK, PARK, ROOF, POND = 1, 2, 3, 4, 5


def noise(size: int, length: float, rng: Rng, *, roughness: float = 2.0) -> Field:
    """A random field [size, size], mean 0, deviation 1, smooth below about `length` pixels."""
    # A margin, since the transform joins opposite borders.
    padded = next_fast_len(size + int(2 * length), real=True)
    frequency = np.hypot(fftfreq(padded)[:, None], rfftfreq(padded)[None])
    response = (1.0 + (frequency * length * 1.5) ** 2) ** (-roughness / 1.3)
    white = rfft2(rng.standard_normal((padded, padded)))
    field: Field = irfft2(white * response, s=(padded, padded))[:size, :size]
    spread = float(field.std())
    return (field - field.mean()) / spread if spread > 0 else field


class _Canvas:
    """The maps while they are drawn."""

    def __init__(self, size: int, rng: Rng) -> None:
        self.size = size
        self.rng = rng
        self.cover: Labels = np.zeros((size, size), dtype=np.int64)
        self.unit: Labels = np.zeros((size, size), dtype=np.int64)
        self.ground: Labels = np.zeros((size, size), dtype=np.int64)
        self.rows: Field = np.zeros((size, size))
        self.row, self.column = (axis.astype(float) for axis in np.indices((size, size)))
        self.warp = (3.5 * noise(size, 14.0, rng), 3.5 * noise(size, 14.0, rng))
        self.moisture = noise(size, 22.0, rng)
        self.patches = noise(size, 16.0, rng)
        self.units = 0

    def fill(self, where: npt.NDArray[np.bool_], cover: str, *, rows: Field | float = 0.0) -> None:
        """One patch of `cover`."""
        self.units += 1
        self.cover[where] = COVER[cover]
        self.unit[where] = self.units
        self.ground[where] = 0
        self.rows[where] = rows[where] if isinstance(rows, np.ndarray) else rows

    def grid(
        self, where: npt.NDArray[np.bool_], cover: str, cell: tuple[float, float], gap: int
    ) -> Field:
        """Cells of `cell` pixels, turned at random; borders get ground `gap`.

        Returns the coordinate across the lanes of cells, of the pixels in `where`.
        """
        angle = self.rng.uniform(0.0, np.pi)
        row, column = self.row[where], self.column[where]
        along = column * np.cos(angle) + row * np.sin(angle) + 0.25 * self.warp[0][where]
        across: Field = row * np.cos(angle) - column * np.sin(angle) + 0.25 * self.warp[1][where]
        lane = np.floor(across / cell[1])
        offset = self.rng.uniform(0.0, cell[0], 4096)[lane.astype(np.int64) % 4096]
        slot = np.floor((along + offset) / cell[0])
        keys = (lane * 100003 + slot).astype(np.int64)
        _, numbers = np.unique(keys, return_inverse=True)
        self.cover[where] = COVER[cover]
        self.unit[where] = numbers + self.units + 1
        self.units += int(numbers.max(initial=0)) + 1
        border = ((across % cell[1]) < 1.0) | (((along + offset) % cell[0]) < 1.0)
        self.ground[where] = np.where(border, gap, 0)
        return across

    def by_level(
        self, where: npt.NDArray[np.bool_], field: Field, shares: Mapping[str, float]
    ) -> None:
        """Divide `where` by levels of `field`, lowest first, into covers of the given shares."""
        if not where.any():
            return
        names = list(shares)
        edges = np.cumsum([shares[name] for name in names])[:-1] / sum(shares.values())
        levels = np.searchsorted(np.quantile(field[where], edges), field)
        for level, name in enumerate(names):
            self.fill(where & (levels == level), name)


def draw_landscape(
    size: int, rng: Rng, zones: Mapping[str, float], *, rivers: float, lakes: float
) -> Landscape:
    """A landscape of `size` x `size` pixels.

    Parameters
    ----------
    zones : weight of each kind of zone (a name of `ZONES`).
    rivers, lakes : chance that the scene has a river, a lake.
    """
    canvas = _Canvas(size, rng)
    cells = max(4, round((size / ZONE_SPACING) ** 2))
    seeds = rng.uniform(0.0, size, (cells, 2))
    places = np.stack([canvas.row + canvas.warp[0], canvas.column + canvas.warp[1]], axis=-1)
    _, zone = cKDTree(seeds).query(places)
    for cell, kind in enumerate(_kinds(cells, zones, rng)):
        where = zone == cell
        if where.any():
            _PAINTERS[kind](canvas, where)
    if rng.random() < lakes:
        _lake(canvas)
    if rng.random() < rivers:
        _river(canvas)
    _road(canvas)
    _farms(canvas)
    surveyed = rng.random(canvas.units + 1)[canvas.unit] >= UNSURVEYED
    return Landscape(
        cover=canvas.cover,
        unit=canvas.unit,
        ground=canvas.ground,
        height=noise(size, 30.0, rng, roughness=2.4),
        rows=canvas.rows,
        surveyed=surveyed,
    )


def _kinds(cells: int, zones: Mapping[str, float], rng: Rng) -> list[str]:
    """A kind a cell: drawn by weight, spread so that a scene rarely repeats one alone."""
    names = list(zones)
    weights = np.array([zones[name] for name in names])
    # Systematic sampling: each kind appears its expected number of times, rounded at random.
    picks = (rng.random() + np.arange(cells)) / cells
    chosen = np.searchsorted(np.cumsum(weights / weights.sum()), picks).clip(max=len(names) - 1)
    return [names[index] for index in rng.permutation(chosen)]


def _fields(cover: str, cell: tuple[float, float], villages: float) -> Callable[..., None]:
    def paint(canvas: _Canvas, where: npt.NDArray[np.bool_]) -> None:
        stretch = canvas.rng.uniform(0.85, 1.2)
        across = canvas.grid(where, cover, (cell[0] * stretch, cell[1] * stretch), TRACK)
        canvas.rows[where] = np.sin(2 * np.pi * across / 2.6)
        for _ in range(canvas.rng.poisson(villages)):
            _village(canvas, where)

    return paint


def _orchards(canvas: _Canvas, where: npt.NDArray[np.bool_]) -> None:
    across = canvas.grid(where, "orchard", (15.0, 15.0), TRACK)
    canvas.rows[where] = np.sin(2 * np.pi * across / 4.0)


def _patches(shares: Mapping[str, float], *, wet: bool = False) -> Callable[..., None]:
    def paint(canvas: _Canvas, where: npt.NDArray[np.bool_]) -> None:
        canvas.by_level(where, canvas.moisture if wet else canvas.patches, shares)

    return paint


def _town(canvas: _Canvas, where: npt.NDArray[np.bool_]) -> None:
    canvas.grid(where, "town", (9.0, 7.0), ROAD)
    parks = canvas.rng.random(canvas.units + 1)[canvas.unit] < 0.12
    canvas.ground[where & parks] = PARK


def _works(canvas: _Canvas, where: npt.NDArray[np.bool_]) -> None:
    canvas.grid(where, "works", (18.0, 12.0), ROAD)


def _village(canvas: _Canvas, where: npt.NDArray[np.bool_]) -> None:
    rows, columns = np.nonzero(where)
    pick = canvas.rng.integers(len(rows))
    radius = canvas.rng.uniform(5.0, 8.0)
    area = _blob(canvas, rows[pick], columns[pick], radius) & where
    if area.any():
        canvas.grid(area, "village", (5.0, 4.0), ROAD)
        gardens = canvas.rng.random(canvas.units + 1)[canvas.unit] < 0.2
        canvas.ground[area & gardens] = PARK


def _blob(canvas: _Canvas, row: float, column: float, radius: float) -> npt.NDArray[np.bool_]:
    distance = np.hypot(
        canvas.row - row + 0.6 * canvas.warp[0], canvas.column - column + 0.6 * canvas.warp[1]
    )
    return distance < radius


def _lake(canvas: _Canvas) -> None:
    row, column = canvas.rng.uniform(0.1, 0.9, 2) * canvas.size
    radius = canvas.rng.uniform(9.0, 15.0)
    canvas.fill(_blob(canvas, row, column, radius), "lake")


def _river(canvas: _Canvas) -> None:
    angle = canvas.rng.uniform(0.0, np.pi)
    centre = canvas.rng.uniform(0.2, 0.8, 2) * canvas.size
    along = (canvas.column - centre[1]) * np.cos(angle) + (canvas.row - centre[0]) * np.sin(angle)
    across = (canvas.row - centre[0]) * np.cos(angle) - (canvas.column - centre[1]) * np.sin(angle)
    phase = canvas.rng.uniform(0.0, 2 * np.pi, 2)
    bends = 6.0 * np.sin(along / 16.0 + phase[0]) + 2.5 * np.sin(along / 6.5 + phase[1])
    half = canvas.rng.uniform(2.8, 4.2)
    canvas.fill(np.abs(across - bends) < half, "river")


def _road(canvas: _Canvas) -> None:
    """A straight road: seen in the image, not in the labels, as surveys of this scale have it."""
    angle = canvas.rng.uniform(0.0, np.pi)
    centre = canvas.rng.uniform(0.2, 0.8, 2) * canvas.size
    across = (canvas.row - centre[0]) * np.cos(angle) - (canvas.column - centre[1]) * np.sin(angle)
    water = np.isin(canvas.cover, (COVER["river"], COVER["lake"]))
    canvas.ground[(np.abs(across) < 1.1) & ~water] = ROAD


def _farms(canvas: _Canvas) -> None:
    """Single roofs and ponds, too small for the label map, all over the scene.

    They also see to it that every scene has something bright and something dark, as real tiles do.
    """
    count = max(3, round((canvas.size / _FARM_SPACING) ** 2))
    for kind in (ROOF, POND):
        for row, column in canvas.rng.integers(1, canvas.size - 2, (count, 2)):
            height, width = canvas.rng.integers(2, 4, 2)
            canvas.ground[row : row + height, column : column + width] = kind


_PAINTERS: dict[str, Callable[[_Canvas, npt.NDArray[np.bool_]], None]] = {
    "paddies": _fields("paddy", (10.0, 8.0), 0.8),
    "farmland": _fields("dry farm", (30.0, 11.0), 1.0),
    "orchards": _orchards,
    "woods": _patches({"woodland": 1.0}),
    "conifers": _patches({"conifers": 0.85, "woodland": 0.15}),
    "meadows": _patches({"grassland": 0.8, "woodland": 0.2}),
    "scrub": _patches({"shrubs": 0.55, "steppe": 0.45}),
    "marsh": _patches({"marsh": 0.8, "grassland": 0.2}, wet=True),
    "barrens": _patches({"bare land": 0.8, "steppe": 0.2}),
    "sands": _patches({"sand": 0.75, "steppe": 0.25}),
    "salt": _patches({"salt flat": 0.65, "bare land": 0.35}),
    "town": _town,
    "works": _works,
}
