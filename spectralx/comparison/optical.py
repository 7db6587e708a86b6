"""An optical foundation model in small, for data and machines that have no public one.

The images of a task in red, green and blue alone; a backbone that has learnt to reconstruct them
knows scenes but not spectra, which is what the methods are there to add.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spectralx.checkpoints.sources import RGB
from spectralx.cli import refresh_seconds, write_text
from spectralx.data import ImageDataset, Task, write_raster
from spectralx.pictures import composite_bands
from spectralx.settings import Settings


def optical_copy(task: Task, folder: Path, *, progress: bool = True) -> Path:
    """The source domain of `task` in red, green and blue, as a folder of tiles.

    Parameters
    ----------
    task : whose training, validation and source test images are copied with their labels.
    folder : where to; made beside its place and moved there when complete. One that is there is
        kept.
    progress : show a progress bar on stderr.

    Returns
    -------
    `folder`, for the task "folder".
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("images", "labels"):
        (partial / name).mkdir(parents=True)
    bands = list(composite_bands(task.wavelengths, RGB))
    parts = {"train": task.train, "validation": task.validation, "test": task.source_test}
    total = sum(len(dataset) for dataset in parts.values())
    with tqdm(
        total=total,
        desc="optical images",
        unit="image",
        disable=not progress,
        mininterval=refresh_seconds(),
    ) as bar:
        for split, dataset in parts.items():
            _copy(dataset, split, bands, partial, bar)
    os.replace(partial, folder)
    return folder


def _copy(dataset: ImageDataset, split: str, bands: list[int], root: Path, bar: tqdm) -> None:
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["image", "mask"])
    for index in range(len(dataset)):
        values, valid = dataset.read_values(index)
        image = np.where(valid[bands], values[bands], np.nan).astype(np.float32)
        files = [f"{kind}/{split}-{index:06d}.tif" for kind in ("images", "labels")]
        write_raster(
            root / files[0],
            image,
            nodata=float("nan"),
            descriptions=[f"{dataset.wavelengths[band]} um" for band in bands],
        )
        write_raster(root / files[1], dataset.read_classes(index).astype(np.uint8))
        rows.writerow(files)
        bar.update()
    write_text(root / f"{split}.csv", table.getvalue())


def optical_settings(base: Settings, root: Path, out: Path, steps: int) -> Settings:
    """Stage 1 on the `root` of `optical_copy`: the whole backbone, no adapter, `steps` steps."""
    data = dataclasses.replace(
        base.data,
        root=str(root),
        task="folder",
        official=False,
        wavelengths=None,
        class_names=None,
        nodata=None,
    )
    model = dataclasses.replace(base.model, adapter=None, adapter_options={}, trainable="all")
    run = dataclasses.replace(
        base.stage1.run, steps=steps, validate_every=min(base.stage1.run.validate_every, steps)
    )
    stage1 = dataclasses.replace(base.stage1, run=run)
    return dataclasses.replace(base, data=data, model=model, stage1=stage1, out=str(out))
