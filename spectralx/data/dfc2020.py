"""DFC2020: Sentinel-2 tiles (13 bands) of seven cities in four seasons, with 8 land covers.

On disk below the root::

    <season>/image/s2_<city>/ROIs0000_<season>_s2_<city>_p<N>.tif
    <season>/label/dfc_<city>/ROIs0000_<season>_dfc_<city>_p<N>.tif

``s1_*`` folders (radar) are skipped. Raw label values are those of the simplified IGBP scheme, of
which eight are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .normalise import Normalisation
from .raster import data_error, list_rasters
from .tiles import UNLABELLED, Pair, TileDataset

# µm
WAVELENGTHS = (
    0.443, 0.490, 0.560, 0.665, 0.705, 0.740, 0.783, 0.833, 0.865, 0.943, 1.380, 1.610, 2.190,
)  # fmt: skip

CLASS_NAMES = (
    UNLABELLED, "forest", "shrubland", "grassland", "wetlands", "croplands", "urban", "barren",
    "water",
)  # fmt: skip

SEASONS = ("spring", "summer", "autumn", "winter")

# Raw value to class; every other raw value is unlabelled.
LABEL_VALUES = {1: 1, 2: 2, 4: 3, 5: 4, 6: 5, 7: 6, 9: 7, 10: 8}
# The published protocol leaves raw 3 and 8 as they are, where they collide with classes 3 and 8.
OFFICIAL_LABEL_VALUES = LABEL_VALUES | {3: 3, 8: 8}


class Dfc2020(TileDataset):
    """The tiles of one or several seasons.

    Parameters
    ----------
    root : folder that holds the seasons' folders.
    seasons : one of "spring", "summer", "autumn", "winter", or several.
    official_labels : keep the raw values 3 and 8 under those numbers, as the published protocol
        does; by default they are unlabelled.
    normalisation : see :class:`spectralx.data.tiles.TileDataset`, where the samples and the
        attributes (`wavelengths`, `class_names`, ...) are described; 9 classes with 0.
    """

    def __init__(
        self,
        root: str | Path,
        seasons: str | Sequence[str] = SEASONS,
        *,
        official_labels: bool = False,
        normalisation: Normalisation | None = None,
    ) -> None:
        chosen = (seasons,) if isinstance(seasons, str) else tuple(seasons)
        pairs = [pair for season in chosen for pair in _season_pairs(Path(root), season)]
        super().__init__(
            pairs,
            name=f"DFC2020 {'+'.join(chosen)}",
            wavelengths=WAVELENGTHS,
            class_names=CLASS_NAMES,
            label_values=OFFICIAL_LABEL_VALUES if official_labels else LABEL_VALUES,
            other_labels=0,
            normalisation=normalisation,
        )


def _season_pairs(root: Path, season: str) -> list[Pair]:
    if season not in SEASONS:
        raise ValueError(f"season: found {season!r}; expected one of {', '.join(SEASONS)}")
    images = root / season / "image"
    if not images.is_dir():
        raise data_error(images, "no such folder", f"the images of DFC2020 {season}")
    cities = sorted(folder for folder in images.glob("s2_*") if folder.is_dir())
    if not cities:
        raise data_error(images, "no s2_* folder", f"one for each city of DFC2020 {season}")
    pairs = []
    for city in cities:
        labels = root / season / "label" / city.name.replace("s2_", "dfc_", 1)
        pairs += [
            Pair(image, labels / image.name.replace("_s2_", "_dfc_", 1))
            for image in list_rasters(city, f"DFC2020 {season}")
        ]
    return pairs
