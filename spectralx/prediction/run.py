"""One scene from start to end: read, predict, blend, write."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from spectralx.cli import InputError, refresh_seconds, write_text
from spectralx.data.normalise import MeasuredNormalisation, Scaling
from spectralx.data.raster import open_raster
from spectralx.prediction import output as files
from spectralx.prediction import quicklook
from spectralx.prediction.ahead import ahead
from spectralx.prediction.blend import Blend, Rows, ValidRows
from spectralx.prediction.job import CLASSES, PROBABILITY, Job
from spectralx.prediction.scaling import Scaler
from spectralx.prediction.scene import SceneReading, read_tiles, scene_scaling
from spectralx.prediction.store import Store, discard, folder_of, open_store
from spectralx_kernels import __version__


@dataclass(frozen=True)
class Prediction:
    """What was predicted.

    Attributes
    ----------
    map : GeoTIFF of classes.
    probability, quicklook : files beside it, where they were asked for.
    height, width : of the scene.
    tiles : that the model saw in this run; 0 for a map that was there already.
    seconds : of this run.
    shares : of each class by name, 0 to 1 of all pixels; those that occur. Empty for a map that was
        there already.
    """

    map: Path
    probability: Path | None
    quicklook: Path | None
    height: int
    width: int
    tiles: int
    seconds: float
    shares: dict[str, float]


def run(job: Job, *, overwrite: bool = False, progress: bool = True) -> Prediction:
    """Predict a scene, or go on where an earlier run of the same job was ended.

    Raises
    ------
    ValueError : damaged pixels; an output that is there already and was made of something else.
    OSError : no room on the disk, say; the next run goes on.
    """
    fingerprint = job.fingerprint()
    if not overwrite and job.output.exists():
        if files.read_fingerprint(job.output) != fingerprint:
            raise _there(job.output)
        # Left where a run ended between its last two steps.
        shutil.rmtree(folder_of(job.output), ignore_errors=True)
        return _result(job, 0, 0.0, {})
    begin = time.perf_counter()
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with open_store(job.output, fingerprint, job.layers()) as store:
        beside = [path for path in (job.probability, job.quicklook) if path is not None]
        if store.done == 0 and not overwrite:
            for path in beside:
                if path.exists():
                    raise _there(path)
        tiles = 0
        if store.done < len(job.rows.starts):
            scaling = _scaling(job, store, progress)
            tiles = _predict_rows(job, store, scaling, progress)
        shares = _finish(job, store, fingerprint)
        discard(store)
    return _result(job, tiles, time.perf_counter() - begin, shares)


def _there(path: Path) -> InputError:
    return InputError(
        f"{path}: found a file made of other input, by another model or with other options; "
        "expected none, or --overwrite"
    )


def _result(job: Job, tiles: int, seconds: float, shares: dict[str, float]) -> Prediction:
    info = job.reading.info
    return Prediction(
        job.output, job.probability, job.quicklook, info.height, info.width, tiles, seconds, shares
    )


def _scaling(job: Job, store: Store, progress: bool) -> Scaling:
    """The model's scaling, the same for every tile."""
    normalisation = job.predictor.normalisation
    if isinstance(normalisation, MeasuredNormalisation):
        scaling = normalisation.scaling()
        if len(scaling.low) != len(job.reading.bands):
            raise InputError(
                f"statistics: found {len(scaling.low)} bands in the checkpoint; expected "
                f"{len(job.reading.bands)}, the model's"
            )
        return scaling
    if "low" not in store.noted:
        source = job.reading
        if job.options.statistics_from is not None:
            source = _other_scene(job)
        name = Path(source.info.path).name
        measured = scene_scaling(source, name=name, progress=progress)
        store.note(low=measured.low.tolist(), inverse=measured.inverse.tolist())
    return Scaling(
        np.asarray(store.noted["low"], dtype=np.float32),
        np.asarray(store.noted["inverse"], dtype=np.float32),
        False,
    )


def _other_scene(job: Job) -> SceneReading:
    """The bands of the scene whose statistics are wanted."""
    assert job.options.statistics_from is not None
    path = Path(job.options.statistics_from)
    with open_raster(path) as raster:
        info = raster.info
    own = job.reading.info
    if info.bands != own.bands:
        raise InputError(f"{path}: found {info.bands} bands; expected {own.bands}, the scene's")
    nodata = info.nodata if info.nodata is not None else job.options.nodata
    return SceneReading(info, job.reading.bands, nodata)


@torch.inference_mode()
def _predict_rows(job: Job, store: Store, scaling: Scaling, progress: bool) -> int:
    """Every row of tiles that is not in `store` yet; the number of tiles the model saw."""
    rows, columns, reading = job.rows, job.columns, job.reading
    predictor, device = job.predictor, job.predictor.device
    first = rows.restart(store.done)
    scaler = Scaler(scaling, reading, predictor.model.image_size, device)
    blend = Blend(
        rows,
        columns,
        len(predictor.class_names),
        device,
        probabilities=job.options.probabilities,
        first=first,
    )
    valid = ValidRows(rows, columns, needed=reading.may_miss, first=first)
    batches = read_tiles(
        reading,
        rows,
        columns,
        first_row=first,
        batch_size=job.batch_size,
        pin=device.type == "cuda",
    )
    seen = 0
    with (
        tqdm(
            total=len(rows.starts) * len(columns.starts),
            initial=store.done * len(columns.starts),
            desc=reading.info.path.name,
            unit="tile",
            disable=not progress,
            mininterval=refresh_seconds(),
        ) as bar,
        closing(ahead(batches)) as arriving,
    ):
        for row, group in itertools.groupby(arriving, key=lambda batch: batch.row):
            for batch in group:
                valid.put(row, batch.first_column, batch.valid)
                if batch.pixels is not None:
                    images = scaler(batch.pixels.to(device, non_blocking=True))
                    blend.add(row, batch.columns, predictor.logits(images))
                    seen += len(batch.columns)
                if row >= store.done:
                    bar.update(batch.passed)
            if row >= store.done:
                settled = blend.settled(row)
                if settled is not None:
                    missing = valid.missing(settled.first, len(settled.labels))
                    store.write(settled.first, _arrays(settled, missing))
                store.finish(row + 1)
            if row + 1 < len(rows.starts):
                blend.advance(row)
                valid.advance(row)
    return seen


def _arrays(settled: Rows, missing: Any) -> dict[str, Any]:
    """What is written of settled rows: class 0 and no probability where pixels are missing."""
    labels = settled.labels.numpy()
    if missing is not None:
        labels[missing] = 0
    made = {CLASSES: labels}
    if settled.probability is not None:
        made[PROBABILITY] = files.as_steps(settled.probability.numpy(), missing)
    return made


def _finish(job: Job, store: Store, fingerprint: str) -> dict[str, float]:
    """Write the files under their final names, the map last; the share of each class."""
    names, bands = job.predictor.class_names, job.reading.bands
    counts = quicklook.class_counts(store, CLASSES, len(names))
    wavelengths = job.predictor.wavelengths
    tags = {
        "TIFFTAG_SOFTWARE": f"SpectralX {__version__}",
        "SPECTRALX_SCENE": job.reading.info.path.name,
        "SPECTRALX_CHECKPOINT": job.predictor.digest,
        "SPECTRALX_BANDS": _listed(band + 1 for band in bands),
        files.FINGERPRINT: fingerprint,
    }
    if wavelengths is not None:
        tags["SPECTRALX_WAVELENGTHS_UM"] = _listed(wavelengths)
    made = files.write_cog(job.output, store, CLASSES, job.place, files.class_look(names), tags)
    if job.probability is not None:
        described = (
            names if job.options.probabilities == "all" else ["probability of the map's class"]
        )
        layer = files.write_cog(
            job.probability, store, PROBABILITY, job.place, files.probability_look(described), tags
        )
        os.replace(layer, job.probability)
    if job.quicklook is not None:
        quicklook.draw(job.quicklook, store, CLASSES, job.reading, wavelengths, names, counts)
    write_text(job.categories, files.category_names(names))
    os.replace(made, job.output)
    total = math.fsum(counts.tolist())
    return {
        name: count / total for name, count in zip(names, counts.tolist(), strict=True) if count
    }


def _listed(values: Any) -> str:
    items: Sequence[Any] = list(values)
    return ", ".join(f"{value:g}" for value in items)
