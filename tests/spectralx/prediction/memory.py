"""Most memory that predicting a scene takes beyond predicting a small one, in a process of its own.

    python -m tests.spectralx.prediction.memory [--rows N] [--columns N] [--bands N] [--whole]
                                                [--model large] [--precision bf16-mixed]

Prints bytes: of the scene, of the model's weights, and the most that the process has held so far
(resource.getrusage) when libraries are imported, the model is loaded, a small scene is predicted
("before"), and the scene is. Model and scenes are made by another process. ``--whole``
generates tiles of 224 pixels and a scene of pixels throughout (10,000 x 10,000 x 32 by default:
6.4 GB on the disk, a few minutes); without it the scene is written sparsely and seen in windows of
256 pixels. ``--model large`` takes the paper's ViT-L (drawn weights, 25 classes, 1.6 GB in float32)
and a scene whose upper left tiles alone have pixels, so that the model sees two batches of tiles
while reading, blending and writing see all of the scene.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from rasterio import Affine
from rasterio.windows import Window

from benchmarks.prediction import predictor_of
from spectralx.checkpoints import save
from spectralx.predict import Options, load_predictor, predict_scene
from tests.spectralx.prediction.scenes import FIXED, pixels, save_model


def write_large(path: Path, bands: int, rows: int, columns: int, *, whole: bool) -> None:
    """A striped scene, every 512nd row of blocks of it (or all) with pixels."""
    part = pixels(bands, 128, 512)
    wide = np.tile(part, (1, 1, -(-columns // 512)))[:, :, :columns]
    with rasterio.open(
        path, "w", driver="GTiff", count=bands, height=rows, width=columns, dtype="uint16",
        nodata=0, BIGTIFF="IF_SAFER", SPARSE_OK=True, interleave="band",
        crs="EPSG:32650", transform=Affine(10.0, 0.0, 3e5, 0.0, -10.0, 4e6),
    ) as target:  # fmt: skip
        for row in range(0, rows, 128 if whole else 512):
            count = min(128, rows - row)
            target.write(wide[:, :count], window=Window(0, row, columns, count))


def write_corner(path: Path, bands: int, rows: int, columns: int) -> None:
    """A striped scene with pixels in its upper left corner: four tiles of 224 pixels."""
    write_large(path, bands, rows, columns, whole=False)
    with rasterio.open(path, "r+") as target:
        for row in range(0, rows, 512):
            count = min(128, rows - row)
            blank = np.zeros((bands, count, columns), dtype="uint16")
            target.write(blank, window=Window(0, row, columns, count))
        target.write(pixels(bands, 128, 650), window=Window(0, 0, 650, 128))


def large_model(folder: Path) -> Path:
    """A checkpoint of ViT-L for 32 bands, its weights drawn."""
    found = predictor_of("large", "cpu", "32-true")
    assert found.wavelengths is not None
    return save(
        folder,
        found.model,
        wavelengths=list(found.wavelengths),
        class_names=list(found.class_names),
        normalisation={"kind": "fixed", "mean": [2000.0] * 32, "std": [900.0] * 32},
    )


def peak() -> int:
    """Bytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Checkpoint and scenes, made in a process that is not the one measured."""
    side, window = sizes(options)
    bands = options.bands
    if options.model == "large":
        large_model(folder / "checkpoint")
        write_corner(folder / "large.tif", bands, options.rows, options.columns)
    else:
        statistics = FIXED | {
            key: FIXED[key][:1] * bands
            for key in ("mean", "std")  # type: ignore[index]
        }
        save_model(
            folder / "checkpoint", statistics, bands=bands, tokenizer="conv", image_size=side
        )
        whole = options.whole
        write_large(folder / "large.tif", bands, options.rows, options.columns, whole=whole)
    write_large(folder / "small.tif", bands, window + 64, window + 64, whole=True)


def sizes(options: argparse.Namespace) -> tuple[int, int]:
    """Side of the model's images, and of a window of the scene."""
    return (224, 224) if options.whole or options.model == "large" else (32, 256)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.spectralx.prediction.memory")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--columns", type=int, default=10_000)
    parser.add_argument("--bands", type=int, default=32)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--model", choices=("tiny", "large"), default="tiny")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.prepare is not None:
        prepare(options.prepare, options)
        return 0
    given = list(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "tests.spectralx.prediction.memory", *given]
        subprocess.run([*command, "--prepare", name], check=True)
        imported = peak()
        predictor = load_predictor(folder / "checkpoint", device="cpu", precision=options.precision)
        loaded = peak()
        plan = Options(window=sizes(options)[1], probabilities="top")
        predict_scene(predictor, folder / "small.tif", folder / "a.tif", plan, progress=False)
        before = peak()
        made = predict_scene(
            predictor, folder / "large.tif", folder / "b.tif", plan, progress=sys.stderr.isatty()
        )
        weights = sum(each.nbytes for each in predictor.model.state_dict().values())
        found = {
            "scene": 2 * options.bands * options.rows * options.columns,
            "imported": imported,
            "weights": weights,
            "loaded": loaded,
            "before": before,
            "peak": peak(),
            "tiles": made.tiles,
            "seconds": round(made.seconds, 1),
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
