"""WHU-OHS: 32-band Orbita hyperspectral tiles of Chinese cities with 24 land covers.

On disk below the root::

    tr/ val/ ts/                      each with image/NAME.tif and label/NAME.tif
    transfer-STall/source/            image/NAME.tif, label/NAME.tif
    transfer-STall/target/            the same

where ``source`` and ``target`` may also be divided into ``tr``, ``val`` and ``ts``, either above
``image`` and ``label`` or below them. Images are reflectance times 10000.

Land covers 20 (saline-alkali soil) and 18 (sand) each exist on one side of the transfer only: in
the transfer both become unlabelled, and the others are renumbered in order, 22 classes in all.
"""

from __future__ import annotations

from pathlib import Path

from .normalise import Normalisation
from .raster import data_error, list_rasters
from .tiles import UNLABELLED, Pair, TileDataset

# µm. The published list has 0.569 in the ninth place, out of order: 0.596 with digits exchanged.
WAVELENGTHS = (
    0.466, 0.480, 0.500, 0.520, 0.536, 0.550, 0.566, 0.580, 0.596, 0.610, 0.626, 0.640, 0.656,
    0.670, 0.686, 0.700, 0.716, 0.730, 0.746, 0.760, 0.776, 0.790, 0.806, 0.820, 0.836, 0.850,
    0.866, 0.880, 0.896, 0.910, 0.926, 0.940,
)  # fmt: skip

CLASS_NAMES = (
    UNLABELLED, "paddy field", "dry farm", "woodland", "shrubbery", "sparse woodland",
    "other forest land", "high-covered grassland", "medium-covered grassland",
    "low-covered grassland", "river/canal", "lake", "reservoir/pond", "beach land", "shoal",
    "urban built-up", "rural settlement", "other construction land", "sand", "gobi",
    "saline-alkali soil", "marshland", "bare land", "bare rock", "ocean",
)  # fmt: skip

NOT_TRANSFERRED = (18, 20)
TRANSFER_CLASS_NAMES = tuple(
    name for value, name in enumerate(CLASS_NAMES) if value not in NOT_TRANSFERRED
)
TRANSFER_FOLDER = "transfer-STall"
SPLITS = {"train": "tr", "validation": "val", "test": "ts"}
SIDES = ("source", "target")


def transfer_values() -> dict[int, int]:
    """Raw label value to class of the transfer: 18 and 20 to 0, the others renumbered in order."""
    kept = [value for value in range(len(CLASS_NAMES)) if value not in NOT_TRANSFERRED]
    return dict.fromkeys(NOT_TRANSFERRED, 0) | {value: i for i, value in enumerate(kept)}


class WhuOhs(TileDataset):
    """A split of WHU-OHS without a domain gap: ``tr``, ``val`` or ``ts``.

    Parameters
    ----------
    root : folder that holds ``tr``, ``val`` and ``ts``.
    split : "train", "validation" or "test".
    normalisation : see :class:`spectralx.data.tiles.TileDataset`, where the samples and the
        attributes (`wavelengths`, `class_names`, ...) are described; 25 classes with 0.
    """

    def __init__(
        self, root: str | Path, split: str, *, normalisation: Normalisation | None = None
    ) -> None:
        folder = Path(root) / _folder_of(split)
        name = f"WHU-OHS {split}"
        super().__init__(
            _pairs(folder / "image", folder / "label", name),
            name=name,
            wavelengths=WAVELENGTHS,
            class_names=CLASS_NAMES,
            normalisation=normalisation,
        )


class WhuOhsTransfer(TileDataset):
    """One side of the WHU-OHS transfer across regions.

    Parameters
    ----------
    root : folder that holds ``transfer-STall``.
    side : "source" or "target".
    split : "train", "validation" or "test" where the side is divided on disk (see
        :func:`is_divided`); None for all of its files.
    normalisation : see :class:`spectralx.data.tiles.TileDataset`; 23 classes with 0.
    """

    def __init__(
        self,
        root: str | Path,
        side: str,
        split: str | None = None,
        *,
        normalisation: Normalisation | None = None,
    ) -> None:
        folder = side_folder(root, side)
        name = f"WHU-OHS {side}" + (f" {split}" if split else "")
        if split is None:
            splits = list(SPLITS.values()) if is_divided(root, side) else [""]
        else:
            splits = [_folder_of(split)]
        pairs: list[Pair] = []
        for part in splits:
            above = (folder / part / "image").is_dir()
            base = folder / part if above else folder
            below = "" if above else part
            pairs += _pairs(base / "image" / below, base / "label" / below, name)
        super().__init__(
            pairs,
            name=name,
            wavelengths=WAVELENGTHS,
            class_names=TRANSFER_CLASS_NAMES,
            label_values=transfer_values(),
            normalisation=normalisation,
        )


def side_folder(root: str | Path, side: str) -> Path:
    """Folder of one side of the transfer."""
    if side not in SIDES:
        raise ValueError(f"side: found {side!r}; expected one of {', '.join(SIDES)}")
    return Path(root) / TRANSFER_FOLDER / side


def is_divided(root: str | Path, side: str) -> bool:
    """Whether the files of `side` lie in ``tr``, ``val`` and ``ts`` rather than all together."""
    folder = side_folder(root, side)
    places = (folder, folder / "image")
    return any((place / split).is_dir() for place in places for split in SPLITS.values())


def _folder_of(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split: found {split!r}; expected one of {', '.join(SPLITS)}")
    return SPLITS[split]


def _pairs(images: Path, labels: Path, name: str) -> list[Pair]:
    if not images.is_dir():
        raise data_error(images, "no such folder", f"the images of {name}")
    return [Pair(image, labels / image.name) for image in list_rasters(images, name)]
