"""How long training waits for data, as the run itself logs it.

    python -m benchmarks.data_wait [--workers 2] [--side 512] [--steps 6] [--threads 1]
                                   [--model tiny|small|base]

Stage 2 trains on generated scenes in the layout of WHU-OHS (32 bands, uint16, compressed, crops of
224, flips and turns), once for each number of data-loading processes. Printed is what ``speed.csv``
says of the steps after the first figure, which holds the start of the workers: images a second, and
the share of the loop's time (between the end of a step and the next batch at hand, over that and
the steps) that went into waiting. Less than 5 % is the aim with two workers. The processes compete
for the cores of the machine: where all of them compute, reading slows the steps instead of being
waited for, which the images a second of several numbers of workers (``--workers 0 2``) show.

By default a little over a minute on two cores, a third of it for the scenes. Workers start with the
first step, so that four steps behind two of them show whether reading keeps up; the fewer seconds a
step takes the harder that is, and ViT-S takes fewer than the paper's ViT-L.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import as_text
from spectralx.data.scenes import write_scenes
from spectralx.fit import fit
from spectralx.logs import SPEED
from spectralx.options import settings_from_dict

MODELS = {
    "tiny": {"embed_dim": 192, "depth": 4, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
EVERY = 2  # steps between two figures


def measure(root: Path, out: Path, workers: int, options: argparse.Namespace) -> list[str]:
    """One row of the table: a run with so many data-loading processes."""
    run = {"steps": options.steps, "batch_size": options.batch_size, "validate_every": 10_000,
           "save_every": 10_000, "pictures": 0}  # fmt: skip
    values = {
        "data": {"root": str(root), "task": "whu-ohs", "image_size": 224, "crop": "crop",
                 "workers": workers},
        "model": {**MODELS[options.model], "family": "scalemae"},
        "stage2": {"init_from": None, "run": run},
        "trainer": {"accelerator": options.accelerator, "log_every": EVERY, "progress": False,
                    "precision": options.precision, "threads": options.threads},
        "out": str(out),
    }  # fmt: skip
    fit("stage2", settings_from_dict(values, "benchmarks.data_wait"))
    with (out / "stage2" / SPEED).open() as file:
        rows = list(csv.DictReader(file))[1:]
    wait, rate = (
        [float(row[name]) for row in rows] for name in ("data_wait_share", "images_per_second")
    )
    return [
        str(workers),
        f"{statistics.mean(rate):.3g}",
        f"{100 * statistics.mean(wait):.2f} %",
        f"{100 * max(wait):.2f} %",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_wait", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--side", type=int, default=512, help="of the scenes (default: 512)")
    parser.add_argument("--count", type=int, default=3, help="scenes of a split (default: 3)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", choices=tuple(MODELS), default="small")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args(arguments)
    if options.steps < 3 * EVERY:
        parser.error(f"--steps: found {options.steps}; expected {3 * EVERY} or more")
    with tempfile.TemporaryDirectory() as name:
        root = write_scenes(
            "whu-ohs", Path(name, "scenes"), size=options.side, count=options.count, progress=False
        )
        rows = [
            measure(root, Path(name, f"workers-{workers}"), workers, options)
            for workers in options.workers
        ]
    print(
        f"ViT-{options.model}, scenes of {options.side} x {options.side} x 32, batches of "
        f"{options.batch_size}, {options.accelerator}, {options.threads} threads"
    )
    print(as_text([["workers", "images/s", "waiting, mean", "waiting, most"], *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
