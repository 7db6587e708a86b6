"""Linear layers and convolutions of patches beside torch's own: ``python -m benchmarks.linear``.

GFLOP/s of the forward product and of the gradient of x, float32 on the CPU, torch's and ours in
turns, medians of processor time, so for one thread (``OMP_NUM_THREADS=1``). Rows are tokens: 100 of
two images of stage 1 at masking ratio 0.75, 392 and 1568 of HyperT's maps.

Convolutions of patches: milliseconds forward and backward, where images have no gradient, and the
relative error of the output against float64 of the same values.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.clock import ProcessorTime, interleave
from benchmarks.report import as_text
from spectralx_kernels import linear, patch_conv2d

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
# Images, channels, side, outputs, patch: HyperT's low-rank path from 32 bands and on to tokens,
# patch embeddings of twelve bands and of three.
PATCHES = (
    (2, 32, 224, 16, 4),
    (2, 16, 56, 1024, 4),
    (2, 12, 224, 1024, 16),
    (2, 3, 224, 1024, 16),
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


def patches(size: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[float]:
    """Milliseconds and relative error of torch's convolution, then of ours."""
    batch, channels, side, outs, patch = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, side, side, generator=generator).to(dtype)
    weight = torch.randn(outs, channels, patch, patch, generator=generator)
    weight = (weight / weight[0].numel() ** 0.5).to(dtype).requires_grad_()
    bias = torch.randn(outs, generator=generator).to(dtype).requires_grad_()
    hidden = channels == 16  # a map in the middle of a path, not images
    leaves = [x.requires_grad_(), weight, bias] if hidden else [weight, bias]
    convolutions: dict[str, Callable[..., torch.Tensor]] = {
        "torch": partial(F.conv2d, stride=patch),
        "ours": partial(patch_conv2d, backend="cpp"),
    }
    truth = F.conv2d(x.double(), weight.double(), bias.double(), stride=patch).detach()
    grad = torch.randn(truth.shape, generator=generator).to(dtype)

    def step(convolution: Callable[..., torch.Tensor]) -> object:
        return torch.autograd.grad(convolution(x, weight, bias), leaves, grad)

    watch = ProcessorTime()
    runs: dict[str, Run] = {name: _turn(step, run) for name, run in convolutions.items()}
    taken = interleave(runs, watch, seconds=2.0, rounds=(5, 50), warm_up=watch.warm_up)
    found: list[float] = []
    for name, convolution in convolutions.items():
        error = (convolution(x, weight, bias).detach().double() - truth).norm() / truth.norm()
        found += [1e3 * statistics.median(taken[name]), float(error)]
    return found


def main() -> None:
    """Print the tables."""
    table = [["rows, O, D", "torch, forward", "here, forward", "torch, gradient", "here, gradient"]]
    table += [
        [", ".join(map(str, size)), *(f"{rate:.0f}" for rate in rates(*size))] for size in SIZES
    ]
    print(as_text(table))
    heads = ["images, channels, side, O, patch", "dtype"]
    heads += ["torch, ms", "its error", "here, ms", "its error"]
    table = [heads]
    for patched in PATCHES:
        for dtype in (torch.float32, torch.bfloat16):
            cells = [f"{figure:.3g}" for figure in patches(patched, dtype)]
            table.append([", ".join(map(str, patched)), str(dtype).removeprefix("torch."), *cells])
    print()
    print(as_text(table))


if __name__ == "__main__":
    main()
