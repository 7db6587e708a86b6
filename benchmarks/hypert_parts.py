"""What each part of HyperT takes, beside its bare products: ``python -m benchmarks.hypert_parts``.

    python -m benchmarks.hypert_parts [--shape whu-32-b1] [--dtype float32] [--seconds 10]

One forward pass in evaluation on the CPU, parts and products timed in turns, in processor time, so
for one thread (``OMP_NUM_THREADS=1``). Shapes are those of `benchmarks.shapes`. For each part:
`ms`, its share of `whole`, and `products`, ms of the bare matrix products of its sizes. `sums` are
the passes that no product takes along: both positions, the low-rank path's sum and the scaler.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.bench_hypert import drawn_model
from benchmarks.case import Draw, Setting
from benchmarks.clock import ProcessorTime, interleave
from benchmarks.report import as_text
from benchmarks.shapes import HYPERT, HypertShape, find

Run = Callable[[], object]


def parts(shape: HypertShape, setting: Setting) -> dict[str, Run]:
    """The parts of the forward pass, each on what the one before it gave."""
    draw = Draw(setting, seed=0)
    model = drawn_model(shape, draw).eval()
    inner, side = model.proj, shape.image_size
    images = draw.normal(shape.batch, shape.bands, side, side, scale=0.3, offset=0.5)
    features = inner.downsample_module(images)
    rows, channels = features.permute(0, 2, 3, 1), features.flatten(2).unsqueeze(1)
    spatial = inner.spa_semantic_module(rows).flatten(1, 2)
    spectral = inner.spe_semantic_module(channels).squeeze(1)
    tokens = draw.normal(shape.batch, shape.tokens, shape.embed_dim)
    patches = model.up(model.down(images)).flatten(2).transpose(1, 2)

    def sums() -> list[Tensor]:
        return [
            spatial + inner.spatial_positions,
            spectral + inner.spectral_positions,
            model.scaler * (tokens + patches),
        ]

    return {
        "stem": partial(inner.downsample_module, images),
        "spatial block": partial(inner.spa_semantic_module, rows),
        "spectral block": partial(inner.spe_semantic_module, channels),
        "spatial match": partial(inner.spa_match_attn, spatial, inner.spa_query),
        "spectral match": partial(inner.spe_match_attn, spectral, inner.spe_query),
        "feed-forward": partial(inner.feed_forward, tokens),
        "low-rank path": lambda: model.up(model.down(images)),
        "sums": sums,
        "whole": partial(model, images),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hypert_parts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", default="whu-32-b1", choices=[shape.name for shape in HYPERT])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    shape, setting = find(HYPERT, given.shape), Setting("cpu", getattr(torch, given.dtype))
    runs: dict[str, Run] = {}
    with torch.no_grad():
        runs.update(parts(shape, setting))
        for part, products in floors.hypert_parts(shape).items():
            runs[f"products of {part}"] = floors.bare_products(products, setting)
        turns = {name: partial(_call, run) for name, run in runs.items()}
        samples = interleave(turns, ProcessorTime(), seconds=given.seconds, rounds=(3, 30))
    ms = {name: 1e3 * statistics.median(taken) for name, taken in samples.items()}
    rows = [["part", "ms", "share", "products"]]
    for part in (name for name in ms if not name.startswith("products of ")):
        bare = ms.get(f"products of {part}")
        share = f"{100 * ms[part] / ms['whole']:.1f} %"
        rows.append([part, f"{ms[part]:.1f}", share, "" if bare is None else f"{bare:.1f}"])
    print(as_text(rows))


def _call(run: Run, _turn: int) -> object:
    return run()


if __name__ == "__main__":
    main()
