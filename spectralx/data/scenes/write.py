"""Writing a synthetic data set to disk, all of it or none."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from rasterio import Affine
from tqdm import tqdm

from spectralx.data.raster import data_error, write_raster

from .landscape import draw_landscape
from .layouts import LAYOUTS, Layout, Tile
from .render import render

DEFAULT_SIZE = 128
DEFAULT_COUNT = 48
_SMALLEST = 16


def write_scenes(
    layout: str,
    out: str | Path,
    *,
    size: int = DEFAULT_SIZE,
    count: int = DEFAULT_COUNT,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a synthetic data set in the folders, names and values of a real one.

    Parameters
    ----------
    layout : "whu-ohs", "dfc2020" or "mts12".
    out : the folder, which then serves as `root` of :func:`spectralx.data.build_task`.
    size : side of a tile in pixels (of 10 m). The real tiles have 512, 256 and 500.
    count : tiles a domain: a side of the WHU-OHS transfer (its splits without a gap share as many
        again), a season, the north or the south.
    seed : the same seed writes the same files.
    overwrite : replace the folders of this layout in a folder that is not empty; other files stay.
    progress : show a progress bar on stderr.

    Returns
    -------
    `out` as a path. It is written beside its final place and moved there when complete.

    Raises
    ------
    DataError
        `out` is a file, or a folder that is not empty (without `overwrite`).
    ValueError
        An unknown layout, or sizes out of range.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: found {layout!r}; expected one of {', '.join(LAYOUTS)}")
    if size < _SMALLEST:
        raise ValueError(f"size: found {size}; expected at least {_SMALLEST} pixels")
    if count < 3:
        raise ValueError(f"count: found {count}; expected at least 3 tiles, one for each split")
    if seed < 0:
        raise ValueError(f"seed: found {seed}; expected 0 or more")
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise data_error(out, "a file", "a folder")
    if out.is_dir() and not overwrite and any(out.iterdir()):
        raise data_error(out, "a folder that is not empty", "an empty one, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        made = staging / "made"
        tiles = list(LAYOUTS[layout].tiles(count))
        bar = tqdm(tiles, desc=f"{layout} scenes", unit="tile", disable=not progress)
        for tile in bar:
            _write_tile(made, LAYOUTS[layout], tile, size=size, seed=seed)
        _move(made, out, staging / "replaced")
    finally:
        shutil.rmtree(staging)
    return out


def _write_tile(root: Path, layout: Layout, tile: Tile, *, size: int, seed: int) -> None:
    # Each tile draws from its own stream, keyed by its place, so that it is the same in any set.
    key = zlib.crc32(tile.image.as_posix().encode())
    rng = np.random.default_rng([seed, key])
    region, sensor = tile.domain.region, tile.domain.sensor
    scene = draw_landscape(size, rng, region.zones, rivers=region.rivers, lakes=region.lakes)
    numbers = render(scene, tile.domain, rng)
    label = np.where(scene.surveyed, layout.label_values(scene.cover), 0)
    east, north = (sensor.pixel * int(step) for step in rng.integers(0, 5000, 2))
    georeference: dict[str, Any] = {
        "crs": f"EPSG:{region.epsg}",
        "transform": Affine(sensor.pixel, 0.0, 3e5 + east, 0.0, -sensor.pixel, 4e6 + north),
    }
    for path in (root / tile.image, root / tile.label):
        path.parent.mkdir(parents=True, exist_ok=True)
    wavelengths = sensor.wavelengths * len(tile.domain.dates)
    write_raster(
        root / tile.image,
        numbers,
        descriptions=[f"{wavelength:.3f} um" for wavelength in wavelengths],
        **georeference,
    )
    layout.write_label(root / tile.label, label, georeference)


def _move(made: Path, out: Path, replaced: Path) -> None:
    """Put what was made into place: in one step where `out` is new or empty, else by folder."""
    if out.is_dir() and any(out.iterdir()):
        replaced.mkdir()
        for folder in sorted(made.iterdir()):
            if (out / folder.name).exists():
                (out / folder.name).rename(replaced / folder.name)
            folder.rename(out / folder.name)
        return
    if out.is_dir():
        out.rmdir()
    made.rename(out)
