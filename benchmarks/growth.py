"""How HyperT's time grows with images and pixels: ``python -m benchmarks.growth images``.

    python -m benchmarks.growth images|pixels [--part NAME ...] [--bands C] [--seconds S]

Evaluation in float32 on the CPU; all sizes of a part are timed in turns, in processor time, so for
one thread (``OMP_NUM_THREADS=1``).

- `stem`: convolutions, linear in pixels;
- `spatial`: the layers of that block are linear in pixels, its attention, within quarters of the
  map, goes with their square;
- `spectral`: attends over the stem's channels, in layers as wide as the map has positions: four
  times the pixels are sixteen times those layers, weights included. Up to 448 x 448 here, as the
  weights take gigabytes beyond;
- `spatial match`, `spectral match`: 196 tokens look for their attribute; linear in pixels, and with
  their square;
- `whole`: with images only.

For each size, images x side: `ms`; `time`, relative to the first size; `work`, multiply-adds
relative to the first size (`benchmarks.floors`); `time/size` and `time/work`, 1 where time grows in
proportion.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks import floors
from benchmarks.clock import ProcessorTime, interleave
from benchmarks.report import as_text
from benchmarks.shapes import STEM_WIDTH, TOKENS, WIDTH
from spectralx_kernels import HyperT
from spectralx_kernels.hypert.modules import _AttributeMatch, _Block
from spectralx_kernels.hypert.stem_module import Stem

IMAGES = (1, 2, 4, 8)
SIDES = (224, 448, 672, 896)
SPECTRAL_SIDES = (224, 448)
PARTS = ("stem", "spatial", "spectral", "spatial match", "spectral match")
Run = Callable[[], object]


def built(part: str, batch: int, side: int, bands: int) -> tuple[Run, int]:
    """The part at this size, and its multiply-adds or what is in proportion to them."""
    rows = side // 8
    positions = rows**2
    spatial = torch.randn(batch, rows, rows, STEM_WIDTH)
    spectral = torch.randn(batch, 1, STEM_WIDTH, positions)
    if part == "whole":
        wavelengths = [0.4 + 0.004 * band for band in range(bands)]
        model = HyperT(bands, wavelengths, image_size=side).eval()
        return partial(model, torch.rand(batch, bands, side, side)), batch  # in proportion
    if part == "stem":
        run = partial(Stem(bands, STEM_WIDTH).eval(), torch.rand(batch, bands, side, side))
        return run, batch * side**2  # in proportion
    if part == "spatial":
        products = floors.block(positions, STEM_WIDTH, 8, batch=batch, window=positions // 4)
        return partial(_Block(STEM_WIDTH, 8, (rows // 2, rows // 2)), spatial), total(products)
    if part == "spectral":
        products = floors.block(STEM_WIDTH, positions, 8, batch=batch)
        return partial(_Block(positions, 8, (1, STEM_WIDTH)), spectral), total(products)
    features = (spatial if part == "spatial match" else spectral).flatten(1, 2)
    width, half = features.shape[2], WIDTH // 2
    queries = torch.randn(TOKENS, half)
    inner = width // 2
    products = [
        floors.Product(batch * features.shape[1], width, 2 * inner),
        floors.Product(2 * TOKENS, inner, features.shape[1], batch=batch),
        floors.Product(batch * TOKENS, inner, half),
    ]
    return partial(_AttributeMatch(half, width), features, queries), total(products)


def total(products: list[floors.Product]) -> int:
    return sum(product.operations for product in products) // 2


def grow(part: str, axis: str, bands: int, seconds: float) -> list[list[str]]:
    """The table of one part."""
    sides = SPECTRAL_SIDES if part.startswith("spectral") else SIDES
    sizes = [(images, 224) for images in IMAGES] if axis == "images" else [(1, s) for s in sides]
    runs, works = {}, []
    for batch, side in sizes:
        run, operations = built(part, batch, side, bands)
        runs[f"{batch} x {side}"] = partial(_call, run)
        works.append(operations)
    samples = interleave(runs, ProcessorTime(), seconds=seconds, rounds=(3, 30), warm_up=1)
    medians = [1e3 * statistics.median(samples[name]) for name in runs]
    first = sizes[0][0] * sizes[0][1] ** 2
    rows = [["size", "ms", "time", "work", "time/size", "time/work"]]
    for (batch, side), median, operations in zip(sizes, medians, works, strict=True):
        time, size, more = median / medians[0], batch * side**2 / first, operations / works[0]
        numbers = (time, more, time / size, time / more)
        rows.append([f"{batch} x {side}", f"{median:.1f}", *(f"{n:.2f}" for n in numbers)])
    return rows


def _call(run: Run, _turn: int) -> object:
    return run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("axis", choices=("images", "pixels"))
    parser.add_argument("--part", nargs="+", choices=(*PARTS, "whole"))
    parser.add_argument("--bands", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6.0, help="for a part (default: 6)")
    given = parser.parse_args()
    parts = given.part or (*PARTS, *(["whole"] if given.axis == "images" else []))
    torch.manual_seed(0)
    with torch.no_grad():
        for part in parts:
            print(f"{part}\n{as_text(grow(part, given.axis, given.bands, given.seconds))}\n")


if __name__ == "__main__":
    main()
