"""Reading and writing GeoTIFF, and the one error every reader of this package raises.

Files are opened with the GTiff driver only, so that no other format (a virtual raster that points
elsewhere, say) can hide behind a ``.tif`` name. Every failure is a :class:`DataError` whose text
is one line: the file, what was found, what is expected.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from .errors import DataError as DataError
from .errors import UnreadableError as UnreadableError
from .errors import data_error as data_error
from .errors import first_readable as first_readable
from .errors import unreadable
from .manifest import check_listed as check_listed
from .tiff import missing_bytes
from .wavelengths import wavelengths_of

Array = npt.NDArray[Any]
PixelWindow = tuple[int, int, int, int]  # first row, first column, rows, columns
SUFFIXES = (".tif", ".tiff")
LARGEST_READ = 16 << 30  # bytes of pixels at once; a header may declare any number


@dataclass(frozen=True)
class RasterInfo:
    """What a GeoTIFF says about itself, without its pixels.

    ``nodata`` is the value of missing pixels or None; ``descriptions`` has one entry a band (None
    where the file has none); ``wavelengths`` are the bands' centres in µm, or None unless the file
    states one for each band.
    """

    path: Path
    bands: int
    height: int
    width: int
    dtype: str
    nodata: float | None
    descriptions: tuple[str | None, ...]
    wavelengths: tuple[float, ...] | None
    crs: Any
    transform: Any


def raster_info(path: str | Path) -> RasterInfo:
    """Header of the GeoTIFF at `path`. Raises DataError if it is missing or not a GeoTIFF."""
    with _open(path) as source:
        return _info(Path(path), source)


def read_raster(
    path: str | Path,
    *,
    bands: Sequence[int] | None = None,
    window: PixelWindow | None = None,
) -> Array:
    """Pixels of a GeoTIFF.

    Parameters
    ----------
    path : the file.
    bands : band indices counted from 0, in the order wanted; None for all.
    window : (first row, first column, rows, columns) inside the image; None for all of it.

    Returns
    -------
    Array [bands, rows, columns] in the file's own dtype.

    Raises
    ------
    DataError
        The file is missing, not a GeoTIFF, truncated or damaged, not the one of the folder's
        manifest (`spectralx.data.manifest`), or declares more than `LARGEST_READ` bytes; `bands` or
        `window` reach outside of it.
    """
    with _open(path) as source:
        return _read(Path(path), source, bands, window)


def read_image(
    path: str | Path,
    *,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    window: PixelWindow | None = None,
    count: int | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], RasterInfo]:
    """An image as float32, with the map of its valid values and its header.

    A value is missing where it equals the file's nodata value (or `nodata`, for files that state
    none), or is not finite; missing values are returned as 0.

    Parameters
    ----------
    path, bands, window : as for :func:`read_raster`.
    nodata : value of missing pixels for files that state none.
    count : number of bands the file must have; None accepts any.

    Returns
    -------
    values [bands, rows, columns] float32, valid [bands, rows, columns] bool, header (of all bands).
    """
    with _open(path) as source:
        info = _info(Path(path), source)
        raw, missing = _read_stored(info, source, bands, nodata, window, count)
    return *as_values(raw, missing), info


def read_stored(
    path: str | Path,
    *,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    window: PixelWindow | None = None,
    count: int | None = None,
) -> tuple[Array, float | None]:
    """An image in the file's own type, and the value of its missing pixels.

    Parameters are those of :func:`read_image`.
    """
    with _open(path) as source:
        info = _info(Path(path), source)
        return _read_stored(info, source, bands, nodata, window, count)


def _read_stored(
    info: RasterInfo,
    source: Any,
    bands: Sequence[int] | None,
    nodata: float | None,
    window: PixelWindow | None,
    count: int | None,
) -> tuple[Array, float | None]:
    if count is not None and info.bands != count:
        raise data_error(info.path, f"{info.bands} bands", f"{count}, as many as wavelengths")
    raw = _read(info.path, source, bands, window)
    return raw, info.nodata if info.nodata is not None else nodata


def as_values(
    raw: Array, nodata: float | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """`raw` as float32, 0 where values are missing, and where they are valid."""
    valid = valid_values(raw, nodata)
    values = raw.astype(np.float32)
    values[~valid] = 0.0
    return values, valid


@dataclass(frozen=True)
class OpenRaster:
    """A GeoTIFF held open, to be read by window; of one thread.

    `source` is rasterio's dataset, for what `info` does not say.
    """

    info: RasterInfo
    source: Any

    def read(
        self,
        *,
        bands: Sequence[int] | None = None,
        window: PixelWindow | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Array:
        """As :func:`read_raster`; with `shape` as many rows and columns, the nearest pixels."""
        return _read(self.info.path, self.source, bands, window, shape)


@contextmanager
def open_raster(path: str | Path) -> Iterator[OpenRaster]:
    """The GeoTIFF at `path`, for many reads. Raises DataError if it is missing or not one."""
    with _open(path) as source:
        yield OpenRaster(_info(Path(path), source), source)


def valid_values(raw: Array, nodata: float | None) -> npt.NDArray[np.bool_]:
    """Where `raw` is finite and not `nodata` (a nodata value of NaN is covered by the former)."""
    valid = np.isfinite(raw) if raw.dtype.kind == "f" else np.ones(raw.shape, dtype=bool)
    if nodata is not None and np.isfinite(nodata) and _fits(nodata, raw.dtype):
        # Compared in the file's dtype, in which the nodata value was written.
        valid &= raw != np.asarray(nodata).astype(raw.dtype)
    return valid


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether a pixel of `dtype` can have `value`: -9999 is no missing pixel of unsigned ones."""
    if dtype.kind not in "iu":
        return True
    limits = np.iinfo(dtype)
    return limits.min <= value <= limits.max and value == int(value)


def read_label(path: str | Path, window: PixelWindow | None = None) -> npt.NDArray[np.int64]:
    """A label map [rows, columns] of one band; its nodata pixels become 0 (unlabelled).

    Raises DataError for more than one band or values that are not whole numbers.
    """
    values, _, info = read_image(path, window=window)
    if info.bands != 1:
        raise data_error(path, f"{info.bands} bands", "a label map of 1 band")
    return whole_numbers(path, values[0])


def whole_numbers(path: str | Path, values: Array) -> npt.NDArray[np.int64]:
    """`values` as int64. Raises DataError, naming `path`, where one is not a whole number."""
    if values.dtype.kind not in "biuf":
        raise data_error(path, f"label values of type {values.dtype}", "whole numbers")
    if values.dtype.kind == "f":
        broken = ~np.isfinite(values) | (values != np.round(values))
        if broken.any():
            raise data_error(path, f"label value {values[broken][0]:g}", "whole numbers")
    return values.astype(np.int64)


def write_raster(
    path: str | Path,
    array: Array,
    *,
    crs: Any = None,
    transform: Any = None,
    nodata: float | None = None,
    descriptions: Sequence[str] | None = None,
    compress: str | None = None,
) -> None:
    """Write a GeoTIFF; nothing is left at `path` unless all of it was written.

    Parameters
    ----------
    path : the file; its folder must exist.
    array : [bands, rows, columns] or [rows, columns].
    crs, transform : as rasterio takes them (an ``"EPSG:32650"`` string, an Affine).
    nodata : value that marks missing pixels.
    descriptions : one text a band, e.g. ``"0.466 um"``.
    compress : GDAL's name of a lossless scheme, e.g. ``"deflate"``; None stores as is.
    """
    path = Path(path)
    pixels = array[None] if array.ndim == 2 else array
    if pixels.ndim != 3:
        raise ValueError(
            f"array: found shape {tuple(array.shape)}; expected [bands, rows, columns]"
        )
    if descriptions is not None and len(descriptions) != len(pixels):
        raise ValueError(
            f"descriptions: found {len(descriptions)}; expected {len(pixels)}, one a band"
        )
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "count": pixels.shape[0],
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "dtype": pixels.dtype.name,
        "crs": crs,
        "transform": transform,
        "nodata": nodata,
    }
    if compress is not None:
        profile["compress"] = compress
    part = path.with_name(path.name + ".part")
    try:
        with without_georeference_warning(), rasterio.open(part, "w", **profile) as target:
            target.write(pixels)
            for band, text in enumerate(descriptions or (), start=1):
                target.set_band_description(band, text)
        os.replace(part, path)
    except RasterioError as error:
        raise data_error(path, f"no way to write it ({error})", "a writable folder") from error
    finally:
        part.unlink(missing_ok=True)


def list_rasters(folder: str | Path, split: str) -> list[Path]:
    """GeoTIFF files directly in `folder`, sorted by name.

    Raises DataError if the folder is missing, or holds none (an empty `split`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise data_error(folder, "no such folder", f"the folder of {split}")
    files = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
    if not files:
        raise data_error(folder, "no GeoTIFF", f"at least one *.tif: {split} is empty")
    return files


def _info(path: Path, source: Any) -> RasterInfo:
    return RasterInfo(
        path=path,
        bands=source.count,
        height=source.height,
        width=source.width,
        dtype=source.dtypes[0],
        nodata=source.nodata,
        descriptions=tuple(source.descriptions),
        wavelengths=wavelengths_of(source),
        crs=source.crs,
        transform=source.transform,
    )


def _read(
    path: Path,
    source: Any,
    bands: Sequence[int] | None,
    window: PixelWindow | None,
    shape: tuple[int, int] | None = None,
) -> Array:
    area = None
    if window is not None:
        row, column, rows, columns = window
        inside = row >= 0 and column >= 0 and rows > 0 and columns > 0
        if not inside or row + rows > source.height or column + columns > source.width:
            raise data_error(
                path,
                f"{source.height}x{source.width} pixels",
                f"the window {window} (row, column, rows, columns) to lie inside",
            )
        area = Window(column, row, columns, rows)
    indexes = None
    count = source.count if bands is None else len(bands)
    rows, columns = shape or ((source.height, source.width) if window is None else window[2:])
    size = count * rows * columns * np.dtype(source.dtypes[0]).itemsize
    if size > LARGEST_READ:
        raise unreadable(
            path,
            f"{count} bands of {rows}x{columns} pixels, {size:,} bytes",
            f"at most {LARGEST_READ:,} bytes at once: smaller windows (tile in a description)",
        )
    if bands is not None:
        if any(not 0 <= band < source.count for band in bands):
            raise data_error(path, f"{source.count} bands", f"bands {list(bands)}, counted from 0")
        indexes = [band + 1 for band in bands]
    out_shape = None if shape is None else (count, *shape)
    try:
        pixels: Array = source.read(indexes, window=area, out_shape=out_shape)
    except RasterioError as error:
        # The GDAL text names the block that could not be read; rasterio keeps it as the cause.
        reason = str(error.__cause__ or error)
        raise unreadable(
            path, f"pixels that cannot be read ({reason})", "a complete, undamaged GeoTIFF"
        ) from error
    return pixels


@contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    path = Path(path)
    if not path.is_file():
        raise data_error(path, "no such file", "a GeoTIFF")
    check_listed(path)
    try:
        with without_georeference_warning():
            source = rasterio.open(path, driver="GTiff")
    except RasterioError as error:
        raise unreadable(
            path, f"{path.stat().st_size} bytes that do not open as one ({error})", "a GeoTIFF"
        ) from error
    with source:
        missing = missing_bytes(path)
        if missing:
            raise unreadable(
                path, f"a file {missing} bytes too short for its tags", "a complete GeoTIFF"
            )
        yield source


@contextmanager
def without_georeference_warning() -> Iterator[None]:
    # Tiles cut by other software often carry no transform, which nothing here needs.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
