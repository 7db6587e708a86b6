"""A small picture of a scene and its map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from spectralx import pictures
from spectralx.data.raster import open_raster, valid_values
from spectralx.prediction.scene import SceneReading, block_cache
from spectralx.prediction.store import Store

# Longer side of each of the two panels, in pixels of the scene that are shown.
_SIDE = 900
_ROWS = 64  # counted at a time


def class_counts(store: Store, layer: str, classes: int) -> npt.NDArray[np.int64]:
    """Pixels of each class in a finished layer [classes]."""
    counts = np.zeros(classes, dtype=np.int64)
    rows = store.layers[layer].rows
    for row in range(0, rows, _ROWS):
        values = store.rows(layer, row, min(_ROWS, rows - row))
        counts += np.bincount(values.reshape(-1), minlength=classes)
    return counts


def draw(
    path: Path,
    store: Store,
    layer: str,
    reading: SceneReading,
    wavelengths: tuple[float, ...] | None,
    class_names: tuple[str, ...],
    counts: npt.NDArray[np.int64],
) -> None:
    """Every n-th pixel of scene and map, with a legend of the classes.

    Parameters
    ----------
    path : PNG file to write.
    layer : of `store`, the classes.
    wavelengths : of the bands read, in µm; without them three bands spread over all are shown.
    counts : pixels of each class.
    """
    info = reading.info
    step = -(-max(info.height, info.width) // _SIDE)
    labels = np.concatenate(
        [
            store.rows(layer, row, 1)[0, :, step // 2 :: step]
            for row in range(step // 2, info.height, step)
        ]
    )
    known = wavelengths or tuple(float(band) for band in range(1, len(reading.bands) + 1))
    shown = [reading.bands[band] for band in pictures.composite_bands(known)]
    with open_raster(info.path) as raster, block_cache(raster, rows=1):
        raw = raster.read(bands=shown, shape=labels.shape)
    image = raw.astype(np.float32)
    image[~valid_values(raw, reading.nodata)] = np.nan
    pictures.map_with_legend(
        path, image.transpose(1, 2, 0), labels, class_names, (counts / counts.sum()).tolist()
    )
