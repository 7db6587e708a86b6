"""How much of a model's own throughput is left when it predicts a scene.

    python -m benchmarks.prediction [--device cpu|cuda] [--precision 32-true] [--model base|large]
                                    [--side PIXELS] [--batch_size N] [--rounds N] [--compress NAME]
                                    [--clock wall|processor]

A scene of 32 bands is written and predicted whole by `spectralx.predict.predict_scene`: reading,
scaling, blending, the map with its overviews and the quick-look included, all that a user waits
for. In turns with it the model alone runs on images that are in memory already, as many of them and
in batches of the same sizes. Printed are the medians, tiles a second, and the ratio, of which the
aim is 0.9. The largest part of the rest is printed too: the same prediction with a model that does
nothing.

``--clock processor`` counts processor time, for a machine that others use too; it charges the
reading thread in full, though it runs beside the model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rasterio import Affine
from torch import Tensor

from benchmarks.case import Draw, Setting
from benchmarks.clock import Stopwatch, interleave
from benchmarks.report import as_text
from benchmarks.shapes import WAVELENGTHS
from spectralx.data import FixedStatistics, write_raster
from spectralx.prediction.job import Options, prepare
from spectralx.prediction.predictor import Predictor
from spectralx.prediction.run import run
from spectralx.segmentation import Segmentation

SENSOR = "whu"
CLASSES = 25
SIZES = {
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


class ProcessorTime(Stopwatch):
    """Seconds of all threads of the process."""

    def __call__(self, run: Callable[[], object]) -> float:
        begin = time.process_time()
        run()
        return time.process_time() - begin


class Idle(Predictor):
    """A predictor whose model costs nothing: what is left is everything else."""

    def logits(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), len(self.class_names), *self.cells)


def predictor_of(size: str, device: str, precision: str) -> Predictor:
    """A model of `size` with drawn weights."""
    wavelengths = WAVELENGTHS[SENSOR]
    model = Segmentation("scalemae", len(wavelengths), CLASSES, wavelengths, **SIZES[size])  # type: ignore[arg-type]
    Draw(Setting(device, torch.float32), 0).fill(model)
    model.requires_grad_(False).eval().to(device)
    names = ["unlabelled", *(f"class {index}" for index in range(1, CLASSES))]
    scaling = FixedStatistics([2000.0] * len(wavelengths), [900.0] * len(wavelengths))
    return Predictor(model, scaling, tuple(names), tuple(wavelengths), "", precision)  # type: ignore[arg-type]


def write_scene(path: Path, side: int, compress: str | None) -> None:
    """A scene of noise, 10 m a pixel."""
    wavelengths = WAVELENGTHS[SENSOR]
    values = np.random.default_rng(0).integers(200, 4000, (len(wavelengths), side, side))
    write_raster(
        path,
        values.astype(np.uint16),
        crs="EPSG:32650",
        transform=Affine(10, 0, 3e5, 0, -10, 4e6),
        nodata=0,
        descriptions=[f"{wavelength} um" for wavelength in wavelengths],
        compress=compress,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--model", default="base", choices=tuple(SIZES))
    parser.add_argument("--side", type=int, default=560, help="of the scene (default: 560)")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compress", help="of the scene, e.g. deflate; by default none")
    parser.add_argument("--clock", default="wall", choices=("wall", "processor"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device: got cuda, but torch sees no GPU", file=sys.stderr)
        return 2
    predictor = predictor_of(options.model, options.device, options.precision)
    with tempfile.TemporaryDirectory() as folder:
        scene, output = Path(folder, "scene.tif"), Path(folder, "map.tif")
        write_scene(scene, options.side, options.compress)
        job = prepare(predictor, scene, output, Options(batch_size=options.batch_size))
        across = len(job.columns.starts)
        sizes = [
            min(options.batch_size, across - first)
            for _ in job.rows.starts
            for first in range(0, across, options.batch_size)
        ]
        tiles = sum(sizes)
        images = torch.rand(
            options.batch_size, predictor.model.in_channels, *predictor.model.image_size
        ).to(options.device)

        def forward(turn: int) -> None:
            for size in sizes:
                predictor.logits(images[:size])
            if options.device == "cuda":
                torch.cuda.synchronize()

        def predicted(how: Predictor) -> Callable[[int], None]:
            def predict(turn: int) -> None:
                run(replace(job, predictor=how), overwrite=True, progress=False)

            return predict

        idle = Idle(**vars(predictor))
        runs = {
            "model alone": forward,
            "prediction": predicted(predictor),
            "prediction, idle model": predicted(idle),
        }
        watch = Stopwatch() if options.clock == "wall" else ProcessorTime()
        samples = interleave(runs, watch, seconds=1e9, rounds=(options.rounds, options.rounds))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    rows = [
        [
            name,
            f"{seconds:.2f}",
            f"{tiles / seconds:.2f}",
            f"{medians['model alone'] / seconds:.3f}",
        ]
        for name, seconds in medians.items()
    ]
    about = f"ViT-{options.model}, {options.side} x {options.side} x 32, {tiles} tiles of 224"
    print(f"{about}, {options.precision}, {options.clock} time, {torch.get_num_threads()} threads")
    print(as_text([["", "seconds", "tiles/s", "of the model's throughput"], *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
