"""Most memory that predicting a scene takes beyond predicting a small one, in a process of its own.

    python -m tests.spectralx.prediction.memory [--rows N] [--columns N] [--bands N] [--whole]

Prints bytes: of the scene, of the process before the scene (a small one is predicted first, so that
libraries and model are loaded), of its peak after, as resource.getrusage counts it. ``--whole``
generates tiles of 224 pixels and a scene of pixels throughout (10,000 x 10,000 x 32 by default:
6.4 GB on the disk, a few minutes); without it the scene is written sparsely and seen in windows of
256 pixels.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from rasterio import Affine
from rasterio.windows import Window

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


def peak() -> int:
    """Bytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.spectralx.prediction.memory")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--columns", type=int, default=10_000)
    parser.add_argument("--bands", type=int, default=32)
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args(arguments)
    side, window = (224, 224) if options.whole else (32, 256)
    statistics = FIXED | {
        key: FIXED[key][:1] * options.bands
        for key in ("mean", "std")  # type: ignore[index]
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = save_model(
            folder / "checkpoint", statistics, bands=options.bands, tokenizer="conv",
            image_size=side,
        )  # fmt: skip
        predictor = load_predictor(checkpoint, device="cpu")
        plan = Options(window=window, probabilities="top")
        write_large(folder / "small.tif", options.bands, window + 64, window + 64, whole=True)
        predict_scene(predictor, folder / "small.tif", folder / "a.tif", plan, progress=False)
        before = peak()
        scene = folder / "large.tif"
        write_large(scene, options.bands, options.rows, options.columns, whole=options.whole)
        written = peak()
        made = predict_scene(predictor, scene, folder / "b.tif", plan, progress=sys.stderr.isatty())
        found = {
            "scene": 2 * options.bands * options.rows * options.columns,
            "before": before,
            "written": written,
            "peak": peak(),
            "tiles": made.tiles,
            "seconds": round(made.seconds, 1),
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
