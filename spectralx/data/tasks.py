"""Tasks by name: which files train, select and test, without and with a domain gap.

========================================  =========================  ==============================
name                                      trained and selected on    tested on, besides its own test
========================================  =========================  ==============================
WS-WD, WD-WS                              WHU-OHS source (target)    target (source)
spring, summer, autumn, winter            DFC2020, that season       the other three seasons
north-south, south-north                  MTS12 north (south)        south (north)
whu-ohs, dfc2020, mts12                   all domains together       -
folder                                    a folder of tiles          -
FILE.yaml                                 its source, or all         its other domains
========================================  =========================  ==============================

A YAML file describes data of one's own (README.md in this folder); datasets that a program already
has become a task by :func:`register_task`.

Selection uses the source domain only. Where a layout divides a domain on disk, its division is
used; where not, files are divided by a checksum of their path: 80 % train, 10 % validation, 10 %
test. The north of MTS12 has train and validation folders but no test: half of the validation files,
by checksum, become the source's test, and training keeps all of its own. The published protocol,
which selects on the target and scores at the model's size, is there as ``official=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from . import whu_ohs
from .augment import (
    Compose,
    RandomCrop,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCrop,
    Resize,
    Transform,
)
from .damage import SkipDamaged, Skipped
from .description import is_description
from .dfc2020 import SEASONS, Dfc2020
from .domains import Domains, described_domains
from .folder import SPLITS, FolderDataset, folder_pairs
from .mts12 import Mts12
from .normalise import NORMALISATIONS, Normalisation, fit_statistics, fit_whitening
from .raster import data_error
from .samples import ImageDataset
from .tiles import TileDataset, split_by_file
from .whu_ohs import WhuOhs, WhuOhsTransfer

SHARES = (0.8, 0.1, 0.1)
CROPS = ("resize", "crop", "resized-crop")


@dataclass(frozen=True)
class Task:
    """Datasets of a task; see :class:`spectralx.data.samples.ImageDataset`.

    ``target_tests`` maps the name of each other domain to its files: empty for a task without a
    gap. All datasets share bands, `wavelengths` (µm), `class_names` and `num_classes`.
    ``skipped`` names the files that were left out of training and validation, as they were asked
    to be (`spectralx.data.damage`).
    """

    name: str
    train: ImageDataset
    validation: ImageDataset
    source_test: ImageDataset
    target_tests: Mapping[str, ImageDataset]
    skipped: Skipped = field(default_factory=dict)

    @property
    def bands(self) -> int:
        """Number of bands of a sample."""
        return self.train.bands

    @property
    def wavelengths(self) -> tuple[float, ...]:
        """Centre of each band, µm."""
        return self.train.wavelengths

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class, index 0 "unlabelled"."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes, "unlabelled" included."""
        return self.train.num_classes


def build_task(
    name: str,
    root: str | Path,
    *,
    image_size: int | tuple[int, int] | None = 224,
    crop: str = "resize",
    flips: bool = True,
    turns: bool = True,
    spectral_jitter: float = 0.0,
    normalisation: str = "image",
    label_offset: tuple[float, float] = (0.0, 0.0),
    official: bool = False,
    wavelengths: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    nodata: float | None = None,
    skip: SkipDamaged | None = None,
) -> Task:
    """The datasets of a task.

    Parameters
    ----------
    name : one of :func:`task_names`, the path of a YAML file that describes a data set, or the name
        of a registered one.
    root : folder of the data set, as its module describes it; no matter for the other two.
    image_size : side, or (height, width), of the images handed to the model; None keeps the files'.
    crop : how training images get there: "resize", "crop" (a random part at the files' resolution)
        or "resized-crop" (a random part of half the area or more, resized). Validation and test
        images are always resized whole.
    flips, turns : random flips and quarter turns of training images.
    spectral_jitter : deviation of a random offset of each band of a training image, in the units of
        what `normalisation` gives.
    normalisation : "image" (each band of each image by its own minimum and maximum), "fixed" (by
        the mean and deviation of each band over the training files, read once here) or "whitened"
        (by their mean, deviation and correlation of bands; see :mod:`spectralx.data.normalise`).
    label_offset : rows down and columns to the right, in pixels, from where a label stands to the
        place in the image that it describes; all images are resampled to their labels.
    official : the published protocol: validation on the target, masks of validation and test
        resized to `image_size`, DFC2020's raw labels 3 and 8 kept. By default validation is on the
        source and these masks keep the files' size.
    wavelengths, class_names, nodata : for "folder" only; see
        :class:`spectralx.data.folder.FolderDataset`.
    skip : leaves files that cannot be read out of training and validation; None has them end what
        reads them. Tests are never cut short here.

    Raises
    ------
    DataError
        Files that are missing or disagree.
    ValueError
        An unknown name or option.
    """
    builders = _builders()
    own = is_description(name) or name in _REGISTERED
    if name not in builders and not own:
        near = get_close_matches(name, builders, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"task: found {name!r}{hint}; expected one of {', '.join(builders)}, or a YAML file"
        )
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation: found {normalisation!r}; expected one of {', '.join(NORMALISATIONS)}"
        )
    for_folder = {"wavelengths": wavelengths, "class_names": class_names, "nodata": nodata}
    given = [key for key, value in for_folder.items() if value is not None]
    if name != "folder" and given:
        raise ValueError(f"{given[0]}: found with task {name!r}; expected with task 'folder' only")
    training = _training_transform(image_size, crop, flips, turns)
    evaluation = None if image_size is None else Resize(image_size, mask=official)
    root = Path(root)
    if not own and not root.is_dir():
        raise data_error(root, "no such folder", f"the data of task {name}")
    if name in _REGISTERED:
        parts = _REGISTERED[name]
    elif is_description(name):
        parts = described_domains(name)
    elif name == "folder":
        parts = _folder(root, wavelengths, class_names, nodata)
    else:
        parts = builders[name](root, official)
    train, validation, source_test = (part.with_label_offset(label_offset) for part in parts.source)
    targets = {key: part.with_label_offset(label_offset) for key, part in parts.targets.items()}
    if official and targets:
        validation = _together(targets)
    if skip is not None:
        train, validation = skip("train", train), skip("validation", validation)
    scaling: Normalisation = train.normalisation
    if normalisation != "image":
        whitened = normalisation == "whitened"
        scaling = fit_whitening(train.raw) if whitened else fit_statistics(train.raw)

    def finish(dataset: ImageDataset, transform: Transform | None) -> ImageDataset:
        return dataset.with_normalisation(scaling).with_transform(transform)

    return Task(
        name=name,
        train=finish(train, training).with_jitter(spectral_jitter),
        validation=finish(validation, evaluation),
        source_test=finish(source_test, evaluation),
        target_tests={key: finish(part, evaluation) for key, part in targets.items()},
        skipped={} if skip is None else skip.skipped,
    )


def task_names() -> tuple[str, ...]:
    """Names :func:`build_task` knows: eight with a domain gap, then those without."""
    return tuple(_builders())


def register_task(name: str, domains: Domains) -> None:
    """Have `build_task` and the settings know `domains` by `name`, in this process.

    Raises ValueError for a name that means something else.
    """
    if name in _builders() or is_description(name):
        raise ValueError(f"name: found {name!r}; expected one that is not of a task or a YAML file")
    _REGISTERED[name] = domains


_REGISTERED: dict[str, Domains] = {}


def _builders() -> dict[str, Callable[[Path, bool], Domains]]:
    seasons = {
        season: lambda root, official, season=season: _season(root, season, official)
        for season in SEASONS
    }
    return {
        "WS-WD": lambda root, official: _whu_transfer(root, "source", "target"),
        "WD-WS": lambda root, official: _whu_transfer(root, "target", "source"),
        **seasons,
        "north-south": lambda root, official: _north_south(root),
        "south-north": lambda root, official: _south_north(root),
        "whu-ohs": lambda root, official: Domains([WhuOhs(root, split) for split in SPLITS]),
        "dfc2020": lambda root, official: Domains(
            _divide(Dfc2020(root, official_labels=official), root)
        ),
        "mts12": lambda root, official: Domains(_divide(Mts12(root), root)),
        "folder": lambda root, official: _folder(root, None, None, None),
    }


def _whu_transfer(root: Path, source: str, target: str) -> Domains:
    parts: Sequence[TileDataset]
    if whu_ohs.is_divided(root, source):
        parts = [WhuOhsTransfer(root, source, split) for split in SPLITS]
    else:
        parts = _divide(WhuOhsTransfer(root, source), root)
    split = "test" if whu_ohs.is_divided(root, target) else None
    return Domains(parts, {target: WhuOhsTransfer(root, target, split)})


def _season(root: Path, season: str, official: bool) -> Domains:
    own, *others = [season, *(other for other in SEASONS if other != season)]
    parts = _divide(Dfc2020(root, own, official_labels=official), root)
    targets = {other: Dfc2020(root, other, official_labels=official) for other in others}
    return Domains(parts, targets)


def _north_south(root: Path) -> Domains:
    held_out = Mts12(root, "validation")
    halves = split_by_file(held_out.pairs, (0.5, 0.5), root=root, name=held_out.name)
    validation = held_out.subset(halves[0], name="MTS12 north validation")
    test = held_out.subset(halves[1], name="MTS12 north test")
    source = (Mts12(root, "train"), validation, test)
    return Domains(source, {"south": Mts12(root, "test")})


def _south_north(root: Path) -> Domains:
    north = Mts12(root, ("train", "validation"))
    return Domains(_divide(Mts12(root, "test"), root), {"north": north})


def _folder(
    root: Path,
    wavelengths: Sequence[float] | None,
    class_names: Sequence[str] | None,
    nodata: float | None,
) -> Domains:
    train = FolderDataset(root, wavelengths=wavelengths, class_names=class_names, nodata=nodata)
    pairs = folder_pairs(root)
    others = []
    for split in SPLITS[1:]:
        if split not in pairs:
            raise data_error(root / f"{split}.csv", "no such file", "a CSV of image and mask")
        others.append(train.subset(pairs[split], name=f"{root.name} {split}"))
    return Domains((train, *others))


def _divide(dataset: TileDataset, root: Path) -> list[TileDataset]:
    """Train, validation and test of a domain that the disk does not divide."""
    parts = split_by_file(dataset.pairs, SHARES, root=root, name=dataset.name)
    return [
        dataset.subset(part, name=f"{dataset.name} {split}")
        for part, split in zip(parts, SPLITS, strict=True)
    ]


def _together(parts: Mapping[str, ImageDataset]) -> ImageDataset:
    first, *rest = parts.values()
    if not rest:
        return first
    if not all(isinstance(part, TileDataset) for part in parts.values()):
        raise ValueError("official: found targets without files; expected one target, or files")
    assert isinstance(first, TileDataset)
    pairs = [
        pair for part in parts.values() if isinstance(part, TileDataset) for pair in part.pairs
    ]
    return first.subset(pairs, name="+".join(parts))


def _training_transform(
    size: int | tuple[int, int] | None, crop: str, flips: bool, turns: bool
) -> Transform | None:
    if crop not in CROPS:
        raise ValueError(f"crop: found {crop!r}; expected one of {', '.join(CROPS)}")
    steps: list[Transform] = []
    if flips:
        steps.append(RandomFlip())
    if turns:
        steps.append(RandomQuarterTurn())
    if size is not None:
        makers = {"resize": Resize, "crop": RandomCrop, "resized-crop": RandomResizedCrop}
        steps.append(makers[crop](size))
    return Compose(steps) if steps else None
