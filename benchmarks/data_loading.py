"""How fast training images are read, in each of the ways `spectralx.data` offers.

    python -m benchmarks.data_loading [--side 512] [--bands 32] [--count 24] [--workers 0]

Images a second of a training loader (crops of 224, batches of 8, flips and turns), over files of
compressed uint16 that were read before, so the disk is not what is measured. "workers" scales where
images are read, "device" hands over what is stored; `finish` is then part of the time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spectralx.data import write_raster
from spectralx.datamodule import TaskData
from spectralx.settings import DataSettings, RunSettings

BATCH = 8
CACHES = ("files", "disk cache", "memory")
DESCRIPTION = """
images: "*.tif"
labels: "{stem}_label.tiff"
classes: [a, b]
"""


def write(folder: Path, count: int, bands: int, side: int) -> Path:
    """A described data set of smooth scenes with sensor noise, compressed as such files are."""
    draw = np.random.default_rng(0)
    names = [f"{0.45 + 0.015 * band:.3f} um" for band in range(bands)]
    for index in range(count):
        coarse = draw.normal(3000, 800, (bands, side // 32 + 1, side // 32 + 1))
        image = coarse.repeat(32, 1).repeat(32, 2)[:, :side, :side] + draw.normal(0, 20, side)
        pixels = image.clip(0, 65535).astype(np.uint16)
        path = folder / f"{index}.tif"
        write_raster(path, pixels, descriptions=names, compress="deflate")
        label = draw.integers(0, 3, (side, side)).astype(np.uint8)
        write_raster(folder / f"{index}_label.tiff", label, compress="deflate")
    (folder / "own.yaml").write_text(DESCRIPTION)
    return folder / "own.yaml"


def rate(data: TaskData, batches: int) -> float:
    """Images a second over `batches` batches, after one."""
    loader = iter(data.train_dataloader())
    data.on_after_batch_transfer(next(loader), 0)
    start = time.perf_counter()
    for _ in range(batches):
        data.on_after_batch_transfer(next(loader), 0)
    return batches * BATCH / (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("side", 512), ("bands", 32), ("count", 24), ("workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    batches = max(options.count // BATCH, 2)
    with tempfile.TemporaryDirectory() as scratch:
        config = write(Path(scratch), options.count, options.bands, options.side)
        ways = {}
        for cache in CACHES:
            for scale_on in ("workers", "device"):
                settings = DataSettings(
                    task=str(config),
                    image_size=224,
                    crop="crop",
                    cache=cache == "memory",
                    cache_folder=str(Path(scratch, "cache")) if cache == "disk cache" else None,
                    scale_on=scale_on,  # type: ignore[arg-type]
                    workers=options.workers,
                )
                run = RunSettings(steps=batches + 1, batch_size=BATCH)
                ways[cache, scale_on] = TaskData(settings, run)
        rates: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for turn in range(4):
            for way, data in ways.items():
                found = rate(data, batches)
                if turn:  # the first fills the caches
                    rates[way].append(found)
    first = statistics.median(rates["files", "workers"])
    for (cache, scale_on), listed in rates.items():
        median = statistics.median(listed)
        print(f"{cache:<12} {scale_on:<8} {median:8.1f} images/s  {median / first:5.2f}")


if __name__ == "__main__":
    main()
