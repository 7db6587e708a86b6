"""Linear layers beside torch's own: ``python -m benchmarks.linear``.

GFLOP/s of the forward product and of the gradient of x, float32 on the CPU, torch's and ours in
turns, medians of processor time, so for one thread (``OMP_NUM_THREADS=1``). Rows are tokens: 100 of
two images of stage 1 at masking ratio 0.75, 392 and 1568 of HyperT's maps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.clock import ProcessorTime, interleave
from benchmarks.report import as_text
from spectralx_kernels import linear

Run = Callable[[int], object]

# Rows, O, D.
SIZES = (
    (100, 4096, 1024),
    (100, 1024, 4096),
    (100, 3072, 1024),
    (100, 1024, 1024),
    (392, 2048, 512),
    (1568, 512, 2048),
    (2048, 2048, 2048),
)


def _turn(
    run: Callable[..., object], *values: object, **options: object
) -> Callable[[int], object]:
    return lambda _: run(*values, **options)


def rates(rows: int, out: int, width: int) -> list[float]:
    """GFLOP/s: torch and ours forward, torch and ours for the gradient of x."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(out, width, generator=generator)
    grad = torch.randn(rows, out, generator=generator)
    runs: dict[str, Run] = {}
    ours = partial(linear, backend="cpp")
    layers: dict[str, Callable[..., torch.Tensor]] = {"torch": F.linear, "ours": ours}
    for name, layer in layers.items():
        made = layer(x, weight)
        runs[f"{name} forward"] = _turn(layer, x.detach(), weight)
        runs[f"{name} gradient"] = _turn(torch.autograd.grad, made, x, grad, retain_graph=True)
    watch = ProcessorTime()
    taken = interleave(runs, watch, seconds=2.0, rounds=(5, 50), warm_up=watch.warm_up)
    flop = 2 * rows * out * width
    names = ("torch forward", "ours forward", "torch gradient", "ours gradient")
    return [flop / statistics.median(taken[name]) / 1e9 for name in names]


def main() -> None:
    """Print the table."""
    table = [["rows, O, D", "torch, forward", "here, forward", "torch, gradient", "here, gradient"]]
    table += [
        [", ".join(map(str, size)), *(f"{rate:.0f}" for rate in rates(*size))] for size in SIZES
    ]
    print(as_text(table))


if __name__ == "__main__":
    main()
