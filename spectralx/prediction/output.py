"""Finished rows on disk to cloud-optimised GeoTIFF: tiled, compressed, with overviews."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.errors import RasterioError
from rasterio.windows import Window

from spectralx.data.raster import OpenRaster, data_error, without_georeference_warning
from spectralx.pictures import class_colours
from spectralx.prediction.store import Store

# Sides of the blocks of the files, and rows copied at a time.
_BLOCK = 512
# Steps of a probability in a file: 1 is 254, 255 marks missing pixels.
PROBABILITY_STEPS = 254
PROBABILITY_NODATA = 255
FINGERPRINT = "SPECTRALX_FINGERPRINT"
CLASS_NAMES = "CLASS_NAMES"


@dataclass(frozen=True)
class Georeference:
    """Where a scene lies and what its file says about itself, as rasterio gives it."""

    crs: Any
    transform: Any
    gcps: Any
    rpcs: Any
    tags: dict[str, str]

    @classmethod
    def of(cls, raster: OpenRaster) -> Georeference:
        """Of an open scene."""
        source = raster.source
        points, points_crs = source.gcps
        return cls(
            source.crs,
            source.transform,
            (points, points_crs) if points else None,
            source.rpcs,
            dict(source.tags()),
        )


@dataclass(frozen=True)
class Look:
    """What a file says about its bands.

    descriptions : one a band.
    nodata : value of missing pixels.
    resampling : of the overviews, as GDAL names it.
    colours : RGBA by class, for one band of classes.
    scale : what values are multiplied by to be read.
    band_tags : of every band.
    """

    descriptions: Sequence[str]
    nodata: float
    resampling: str
    colours: Mapping[int, tuple[int, int, int, int]] | None = None
    scale: float | None = None
    band_tags: dict[str, str] = field(default_factory=dict)


def class_look(class_names: Sequence[str]) -> Look:
    """Of a map of classes: colours as in the pictures, 0 ("unlabelled") is missing."""
    table = class_colours(len(class_names))
    colours = {index: tuple(round(255 * part) for part in table(index)) for index in range(table.N)}
    colours[0] = (0, 0, 0, 0)
    return Look(
        ["class"],
        0,
        "MODE",
        colours=colours,  # type: ignore[arg-type]
        band_tags={CLASS_NAMES: json.dumps(list(class_names), ensure_ascii=False)},
    )


def probability_look(descriptions: Sequence[str]) -> Look:
    """Of probabilities in steps of 1/254."""
    return Look(descriptions, PROBABILITY_NODATA, "AVERAGE", scale=1.0 / PROBABILITY_STEPS)


def write_cog(
    path: Path, store: Store, layer: str, place: Georeference, look: Look, tags: Mapping[str, str]
) -> Path:
    """A layer of `store` as a file in its folder, complete and on the disk; its path.

    The same rows give the same bytes.

    Parameters
    ----------
    path : final name of the file, which is not touched.
    tags : of the file, besides those of the scene.
    """
    shape = store.layers[layer]
    plain, made = (store.folder / f"{layer}-{kind}.tif" for kind in ("plain", "cog"))
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "count": shape.bands,
        "height": shape.rows,
        "width": shape.columns,
        "dtype": shape.dtype,
        "nodata": look.nodata,
        "crs": place.crs,
        "transform": place.transform,
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "interleave": "band",
        "BIGTIFF": "IF_SAFER",
    }
    if look.colours is None:
        profile["photometric"] = "MINISBLACK"  # three bands are not red, green and blue
    try:
        with without_georeference_warning():
            with rasterio.open(plain, "w", **profile) as target:
                for row in range(0, shape.rows, _BLOCK):
                    count = min(_BLOCK, shape.rows - row)
                    values = store.rows(layer, row, count)
                    target.write(values, window=Window(0, row, shape.columns, count))
                _describe(target, place, look, tags)
            rasterio.shutil.copy(
                plain,
                made,
                driver="COG",
                COMPRESS="DEFLATE",
                BLOCKSIZE=_BLOCK,
                OVERVIEW_RESAMPLING=look.resampling,
                BIGTIFF="IF_SAFER",
            )
    except RasterioError as error:
        raise data_error(path, f"no way to write it ({error})", "a writable folder") from error
    finally:
        plain.unlink(missing_ok=True)
    with made.open("rb") as stream:
        os.fsync(stream.fileno())
    return made


def _describe(target: Any, place: Georeference, look: Look, tags: Mapping[str, str]) -> None:
    if place.gcps is not None:
        target.gcps = place.gcps
    if place.rpcs is not None:
        target.rpcs = place.rpcs
    target.update_tags(**(place.tags | dict(tags)))
    for band, text in enumerate(look.descriptions, start=1):
        target.set_band_description(band, text)
        target.update_tags(band, **look.band_tags)
    if look.colours is not None:
        target.write_colormap(1, look.colours)
    if look.scale is not None:
        target.scales = [look.scale] * len(look.descriptions)


def category_names(class_names: Sequence[str]) -> str:
    """Class names as GDAL's sidecar ``<file>.aux.xml`` holds them, from where viewers take them."""
    root = ElementTree.Element("PAMDataset")
    names = ElementTree.SubElement(
        ElementTree.SubElement(root, "PAMRasterBand", band="1"), "CategoryNames"
    )
    for name in class_names:
        ElementTree.SubElement(names, "Category").text = name
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def read_fingerprint(path: Path) -> str | None:
    """What a finished map says it was made from; None for other files."""
    try:
        with without_georeference_warning(), rasterio.open(path, driver="GTiff") as source:
            found: str | None = source.tags().get(FINGERPRINT)
            return found
    except RasterioError:
        return None


def as_steps(probability: Any, missing: Any) -> Any:
    """Probabilities [.., rows, columns] in steps of 1/254 as uint8; 255 where `missing`."""
    steps = np.rint(np.clip(probability, 0.0, 1.0) * PROBABILITY_STEPS).astype(np.uint8)
    if missing is not None:
        steps[..., missing] = PROBABILITY_NODATA
    return steps
