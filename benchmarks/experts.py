"""Where grouping tokens by expert overtakes running every expert on every token, on the CPU.

``python -m benchmarks.experts [--layer fc1|fc2] [--dtype float32|bfloat16] [--experts 4 8 ...]``
prints the least milliseconds of the adapted layer with k = 2, 394 tokens, both ways forced, each in a process
of its own (``SPECTRALX_AOMOA_EXPERTS`` is read once), which take turns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import torch

from benchmarks.bench_aomoa import build
from benchmarks.case import Runner, Setting
from benchmarks.clock import interleave, stopwatch_for
from benchmarks.shapes import AOMOA, FORWARD, TRAINING, find

WAYS = ("dense", "grouped")
MODES = (FORWARD, TRAINING)


def measure(layer: str, dtype: str, experts: int, seconds: float) -> None:
    """Prints the least times of this process's way, in the order of `MODES`, in milliseconds."""
    setting = Setting(dtype=getattr(torch, dtype))
    shape = replace(find(AOMOA, f"{layer}-vitl-b2"), experts=experts)
    bests = []
    for mode in MODES:
        case = build(shape, mode, setting)
        runner = Runner(case, mode, setting)
        runs = {"fused": partial(runner, case.functions["fused"])}
        samples = interleave(runs, stopwatch_for("cpu"), seconds=seconds, rounds=(5, 200))
        bests.append(1e3 * min(samples["fused"]))
    print(*bests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", nargs="+", default=["fc1", "fc2"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 6, 8, 16, 64])
    parser.add_argument("--turns", type=int, default=2, help="processes a way; the best counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one pass in one process")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.layer[0], chosen.dtype[0], chosen.experts[0], chosen.seconds)
        return
    print("| layer | dtype | E | fwd dense | grouped | fwd+bwd dense | grouped |")
    print("|---|---|---|---|---|---|---|")
    for layer in chosen.layer:
        for dtype in chosen.dtype:
            for experts in chosen.experts:
                best = {way: [float("inf")] * len(MODES) for way in WAYS}
                options = f"--layer {layer} --dtype {dtype} --experts {experts}".split()
                options += ["--seconds", str(chosen.seconds), "--measure"]
                for turn in range(chosen.turns * len(WAYS)):
                    way = WAYS[turn % len(WAYS)]
                    done = subprocess.run(
                        [sys.executable, "-m", "benchmarks.experts", *options],
                        env={**os.environ, "SPECTRALX_AOMOA_EXPERTS": way},
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    taken = [float(word) for word in done.stdout.split()]
                    best[way] = [min(pair) for pair in zip(best[way], taken, strict=True)]
                cells = [f"{best[way][mode]:.1f}" for mode in range(len(MODES)) for way in WAYS]
                print("|", " | ".join([layer, dtype, str(experts), *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
