"""Trained checkpoints on tasks: which belong together, and what each reaches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from spectralx import checkpoints
from spectralx.cli import InputError, one_of, refresh_seconds
from spectralx.data import Task, task_names
from spectralx.data.augment import Resize
from spectralx.data.damage import SkipDamaged
from spectralx.data.dfc2020 import SEASONS
from spectralx.datamodule import TaskData, restore_normalisation
from spectralx.differences import first_difference
from spectralx.evaluation.results import SeedResult, TaskResult
from spectralx.evaluation.scoring import (
    BothSizes,
    Size,
    confusion_at_both_sizes,
    draw_segmentation,
    file_name,
)
from spectralx.metrics import Protocol
from spectralx.options import settings_from_dict
from spectralx.segmentation import Segmentation
from spectralx.settings import RunSettings, Settings

ALL_TASKS = "all"
GAP_TASKS: tuple[str, ...] = task_names()[:8]
"""The eight domain-generalisation tasks."""

DATA_SETS: Mapping[str, tuple[str, ...]] = {
    "whu-ohs": ("WS-WD", "WD-WS", "whu-ohs"),
    "dfc2020": (*SEASONS, "dfc2020"),
    "mts12": ("north-south", "south-north", "mts12"),
}
# What may differ between the seeds of one experiment.
_OF_A_SEED = ("seed", "out", "trainer", "stage2.init_from", "data.root", "data.workers")


@dataclass(frozen=True)
class Trained:
    """A checkpoint that training wrote, its tensors not read yet.

    Attributes
    ----------
    path : its folder.
    manifest : as on disk.
    settings : of its experiment.
    """

    path: Path
    manifest: dict[str, Any]
    settings: Settings

    @classmethod
    def read(cls, path: str | Path) -> Trained:
        """The checkpoint in the folder `path`."""
        folder = Path(path)
        manifest = checkpoints.read_manifest(folder)
        extra: Any = manifest.get("extra") or {}
        if "settings" not in extra or "normalisation" not in manifest:
            raise InputError(
                f"{folder}: found a checkpoint without settings; expected one that spectralx.train "
                "wrote"
            )
        where = str(folder / checkpoints.MANIFEST)
        return cls(folder, manifest, settings_from_dict(extra["settings"], where))

    def data(
        self,
        *,
        root: str | None = None,
        task: str | None = None,
        batch_size: int = 16,
        official: bool | None = None,
    ) -> TaskData:
        """The data of the task it was trained on, or of another `task` or `root`.

        Raises
        ------
        InputError : data of other bands or classes.
        """
        own = self.settings.data
        wanted = dataclasses.replace(
            own,
            root=own.root if root is None else root,
            task=own.task if task is None else task,
            official=own.official if official is None else official,
            cache=False,
            skip_damaged=False,  # nothing is trained, and tests are whole unless asked for
        )
        scaling = restore_normalisation(self.manifest["normalisation"])
        data = TaskData(wanted, RunSettings(batch_size=batch_size), normalisation=scaling)
        self._check_fit(data.task)
        return data

    def _check_fit(self, task: Task) -> None:
        for what, found, expected in (
            ("bands", task.bands, len(self.manifest["wavelengths"])),
            ("classes", task.num_classes, len(self.manifest["class_names"])),
        ):
            if found != expected:
                raise InputError(
                    f"{self.path}: found task {task.name} of {found} {what}; expected {expected}, "
                    "as the checkpoint was trained on"
                )

    def model(self, device: str | None) -> nn.Module:
        """The model with its weights, on `device`; by default the GPU where there is one."""
        model = checkpoints.load(self.path).build()
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def find_checkpoints(paths: Sequence[str | Path]) -> list[Path]:
    """The folders `paths`, or where one is no checkpoint the best of stage 2 of every experiment
    below it."""
    found: list[Path] = []
    for path in map(Path, paths):
        below = sorted(file.parent for file in path.glob(f"**/stage2/best/{checkpoints.MANIFEST}"))
        if below and not (path / checkpoints.MANIFEST).is_file():
            found += below
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def by_task(trained: Sequence[Trained], task: str | None) -> dict[str, list[Trained]]:
    """The checkpoints that are scored on each task, by seed.

    Parameters
    ----------
    trained : checkpoints of stage 2.
    task : where all are scored; None for the task each was trained on; "all" for the same, and
        all eight must be there.

    Raises
    ------
    InputError : stage 1, a task without checkpoint, or checkpoints of a task that are not the
        seeds of one experiment.
    """
    groups: dict[str, list[Trained]] = {}
    for one in trained:
        if one.manifest["model"] != "segmentation":
            raise InputError(f"{one.path}: found a checkpoint of stage 1; expected one of stage 2")
        name = one.settings.data.task if task in (None, ALL_TASKS) else str(task)
        groups.setdefault(name, []).append(one)
    if task == ALL_TASKS:
        missing = [name for name in GAP_TASKS if name not in groups]
        if missing:
            raise InputError(
                f"checkpoint: found none trained on {', '.join(missing)}; expected one of each of "
                "the eight tasks"
            )
    for group in groups.values():
        group.sort(key=lambda one: one.settings.seed)
        _check_one_experiment(group)
    order = {name: position for position, name in enumerate(task_names())}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))


def _check_one_experiment(group: Sequence[Trained]) -> None:
    first = group[0]
    for before, one in pairwise(group):
        if before.settings.seed == one.settings.seed:
            raise InputError(
                f"{one.path}: found seed {one.settings.seed}, which {before.path} has; expected "
                "checkpoints of one experiment with different seeds"
            )
        found = first_difference(
            one.settings.as_dict(), first.settings.as_dict(), ignoring=_OF_A_SEED
        )
        if found is not None:
            raise InputError(
                f"{one.path}: found {found.key} {found.one!r}; expected {found.other!r}, as "
                f"{first.path} has it: the seeds of one experiment"
            )


def roots_by_task(roots: Sequence[str]) -> dict[str, str]:
    """Folder of the data of each task, from ``DIR`` (of all) or ``DATASET=DIR`` each.

    Raises
    ------
    InputError : an unknown data set.
    """
    found: dict[str, str] = {}
    for text in roots:
        name, equals, folder = text.partition("=")
        if not equals:
            found |= dict.fromkeys(task_names(), text)
        elif name in DATA_SETS:
            found |= dict.fromkeys(DATA_SETS[name], folder)
        else:
            raise InputError(f"root: found data set {name!r}; expected {one_of(name, DATA_SETS)}")
    return found


def score_task(
    task: str,
    group: Sequence[Trained],
    *,
    root: str | None = None,
    protocol: Protocol = "proper",
    batch_size: int = 16,
    device: str | None = None,
    pictures_to: Path | None = None,
    count: int = 3,
    skip_damaged: bool = False,
    progress: bool = True,
) -> TaskResult:
    """Score the seeds of one experiment on the test sets of a task, at both sizes.

    Parameters
    ----------
    task, group : as `by_task` gives them.
    root : folder of the data; by default what the checkpoint was trained on.
    protocol : "official" scores as the published code does, labels included.
    batch_size : images at a time.
    device : see `Trained.model`.
    pictures_to : folder for a picture of the first `count` images of each test set, first seed.
    skip_damaged : leave files that cannot be read out of the tests; the result names them.
    progress : show a progress bar on stderr.
    """
    skip: SkipDamaged | None = None
    seeds: list[SeedResult] = []
    sizes: set[tuple[int, int]] = set()
    names: tuple[str, ...] = ()
    image_size = (0, 0)
    for position, one in enumerate(group):
        data = one.data(
            root=root, task=task, batch_size=batch_size, official=protocol == "official"
        )
        model = one.model(device)
        assert isinstance(model, Segmentation)
        names, image_size = data.task.class_names, model.image_size
        # Masks stay at the files' size, under the published protocol too: both sizes are scored.
        if skip_damaged:
            # What the first seed goes without, all do.
            known = None if skip is None else skip.skipped
            skip = SkipDamaged(known, progress=progress)
        for name, dataset in data.tests.items():
            dataset = dataset if skip is None else skip(name, dataset)
            data.tests[name] = dataset.with_transform(Resize(image_size, mask=False))
        found: dict[str, BothSizes] = {}
        for name in data.tests:
            loader = data.test_loader(name)
            what = f"{task}, {name}, seed {one.settings.seed}"
            batches = tqdm(
                loader, desc=what, unit="batch", disable=not progress, mininterval=refresh_seconds()
            )
            found[name] = confusion_at_both_sizes(model, batches, names)
            sizes |= found[name].native_sizes
            if pictures_to is not None and position == 0:
                picture = pictures_to / f"{file_name(name)}.png"
                draw_segmentation(picture, model, loader, data.task, count)
        matrices: dict[Size, dict[str, torch.Tensor]] = {
            "native": {name: both.matrices["native"] for name, both in found.items()},
            "model": {name: both.matrices["model"] for name, both in found.items()},
        }
        step = (one.manifest["extra"] or {}).get("step")
        seeds.append(SeedResult(str(one.path), one.settings.seed, step, matrices))
    first = group[0].settings
    adapter = first.model.adapter or "no adapter"
    return TaskResult(
        task=task,
        trained_on=first.data.task,
        model=f"{first.model.family}, {adapter}, trained: {first.model.trainable}",
        selected_on_target=first.data.official,
        class_names=names,
        image_size=image_size,
        native_sizes=tuple(sorted(sizes)),
        protocol=protocol,
        seeds=seeds,
        skipped={} if skip is None else skip.skipped,
    )
