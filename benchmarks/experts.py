"""Where grouping tokens by expert overtakes running every expert on every token, on the CPU.

``python -m benchmarks.experts [--layer fc1 fc2] [--dtype float32 bfloat16] [--experts 4 8 ...]``
prints the least milliseconds of the adapted layer with k = 2 and 394 tokens, both ways in turns.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.bench_aomoa import build
from benchmarks.case import Runner, Setting
from benchmarks.clock import interleave, stopwatch_for
from benchmarks.shapes import AOMOA, FORWARD, TRAINING, find

SWITCH = "SPECTRALX_AOMOA_EXPERTS"


def forced(way: str, run: Callable[[int], object], turn: int) -> None:
    os.environ[SWITCH] = way
    run(turn)


def measure(layer: str, mode: str, dtype: str, experts: int, seconds: float) -> list[float]:
    """Least milliseconds, dense and grouped."""
    setting = Setting(dtype=getattr(torch, dtype))
    case = build(replace(find(AOMOA, f"{layer}-vitl-b2"), experts=experts), mode, setting)
    run = partial(Runner(case, mode, setting), case.functions["fused"])
    runs = {way: partial(forced, way, run) for way in ("dense", "grouped")}
    samples = interleave(runs, stopwatch_for("cpu"), seconds=seconds, rounds=(5, 200))
    return [1e3 * min(taken) for taken in samples.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", nargs="+", default=["fc1", "fc2"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 6, 8, 16, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="of one layer and pass")
    chosen = parser.parse_args()
    print("| layer | dtype | E | fwd dense | grouped | fwd+bwd dense | grouped |")
    print("|---|---|---|---|---|---|---|")
    for layer in chosen.layer:
        for dtype in chosen.dtype:
            for experts in chosen.experts:
                cells = [
                    f"{least:.1f}"
                    for mode in (FORWARD, TRAINING)
                    for least in measure(layer, mode, dtype, experts, chosen.seconds)
                ]
                print("|", " | ".join([layer, dtype, str(experts), *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
