"""A reduced run of every GPU kernel, to be watched by compute-sanitizer.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitized [--all] [--prepare N]

runs AoMoA, its gating, and convolution and loss of upsampled maps, forward and backward, on every
backend of CUDA but the reference: sizes that fill no tile, that fill several, none, one token,
experts without tokens. ``--all`` runs a drawn call of every other operator as well
(`tests.harden.operators`). Results are only looked at for NaN. ``--prepare N``, without a tool,
runs the same in N processes at once: Triton keeps on disk what they compile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from spectralx_kernels import _backends
from spectralx_kernels.aomoa.ops import AOMOA, GATING
from spectralx_kernels.upsample.convolution import UPSAMPLE_CONV2D
from spectralx_kernels.upsample.prediction import UPSAMPLE_CROSS_ENTROPY_ARGMAX
from tests.gpu import test_upsample
from tests.harden.draws import Draw
from tests.harden.operators import ENTRIES, REGISTRY, Entry
from tests.kernels.aomoa import test_aomoa
from tests.kernels.aomoa.by_name import gating_arguments
from tests.kernels.ladder import cast, moved, run_with_gradients
from tests.kernels.upsample import test_cross_entropy_argmax

DTYPES = (torch.float32, torch.bfloat16)
WEIGHT = 2  # class weights, which only the reference differentiates on a GPU
AOMOA_ARGUMENTS = [
    test_aomoa.arguments(),
    test_aomoa.arguments(tokens=70, width=66, out=50, rank=19, hidden=5, experts=7, top_k=3),
    test_aomoa.arguments(tokens=65, width=64, out=64, rank=32, hidden=16, noisy=False, bias=False),
    test_aomoa.arguments(tokens=0),
    test_aomoa.arguments(tokens=1, experts=1, top_k=1),
]
GATING_ARGUMENTS = [
    gating_arguments(tokens=300),
    gating_arguments(tokens=300, experts=9, top_k=9, noisy=False),
    gating_arguments(tokens=0),
]
CONVOLUTION_ARGUMENTS = [
    test_upsample.convolution(size, by_taps=True, relu=last, last=last)
    for size in ("odd", "3 x 5, down", "no images")
    for last in (False, True)
]
LOSS_ARGUMENTS = [
    test_cross_entropy_argmax.arguments(size, batch=1)
    for size in ("narrow", "up and down", "one row", "many classes")
]
SETS = (
    (AOMOA, AOMOA_ARGUMENTS, ()),
    (GATING, GATING_ARGUMENTS, ()),
    (UPSAMPLE_CONV2D, CONVOLUTION_ARGUMENTS, ()),
    (UPSAMPLE_CROSS_ENTROPY_ARGMAX, LOSS_ARGUMENTS, (WEIGHT,)),
)


DRAWN = 3  # the sample that is drawn of every other operator


def calls(everything: bool) -> Iterator[tuple[Entry, Sequence[Any]]]:
    """Operators with the places of their constants, and arguments in float64."""
    for operator, sets, constants in SETS:
        for args in sets:
            yield replace(REGISTRY[operator.name], constants=constants), args
    if not everything:
        return
    watched = {operator.name for operator, _, _ in SETS}
    for entry in ENTRIES:
        if entry.name not in watched:
            yield entry.on("cuda"), entry.draw(Draw(DRAWN, large=True, conditioned=True))


def run(
    entry: Entry, backend: str, dtype: torch.dtype, args: Sequence[Any], device: str = "cuda"
) -> bool:
    """Forward and backward; whether all that came out is finite."""
    leaves = cast(moved(args, device), dtype, grad=entry.differentiable, constants=entry.constants)
    outputs, grads = run_with_gradients(
        lambda *values: entry.operator(*values, backend=backend), entry.complete(leaves)
    )
    found = [value for value in (*outputs, *grads.values()) if value.is_floating_point()]
    return all(bool(value.isfinite().all()) for value in found)


def prepare(processes: int, everything: bool) -> int:
    """The calls shared out over processes; the largest exit status."""
    command = [sys.executable, "-m", "tests.gpu.sanitized", *(["--all"] if everything else [])]
    running = [
        subprocess.Popen([*command, "--share", f"{place}/{processes}"])
        for place in range(processes)
    ]
    return max(process.wait() for process in running)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitized")
    parser.add_argument("--all", action="store_true", help="every operator")
    parser.add_argument("--prepare", type=int, default=0, metavar="N", help="processes")
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)  # I/N: every N-th call
    options = parser.parse_args(arguments)
    share, shares = (int(part) for part in options.share.split("/"))
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU: nothing was run")
        return 2
    if options.prepare:
        return prepare(options.prepare, options.all)
    runs = 0
    for place, (entry, args) in enumerate(calls(options.all)):
        if place % shares != share:
            continue
        for dtype in DTYPES:
            for backend in _backends.available(entry.name, "cuda", dtype)[:-1]:
                if not run(entry, backend, dtype, args):
                    print(f"{entry.name} on {backend}, {dtype}: not finite")
                    return 1
                runs += 1
    print(f"{runs} runs")
    return 0 if runs or shares > 1 else 1


if __name__ == "__main__":
    sys.exit(main())
