"""What each operator around HyperT's attention gains over the reference, one by one.

``python -m benchmarks.attention [--dtype float32,bfloat16] [--batch 4]``: the paper's sizes on the
CPU, both in one process and in turn; a row is printed only if both agree.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels._operator import Operator
from spectralx_kernels.hypert.attention import ATTRIBUTE_MATCH, WINDOW_ATTENTION
from spectralx_kernels.hypert.dense import FEED_FORWARD, LINEAR_ADD, NORM_LINEAR
from tests.kernels.ladder import relative_error

ROUNDS = 7
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def cases(batch: int, dtype: torch.dtype) -> dict[str, tuple[Operator, list[Any]]]:
    """Operators and arguments of both branches."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape)).to(dtype)

    def layer(width: int, out: int) -> list[Tensor]:
        return [draw(out, width, scale=width**-0.5), draw(out, scale=0.1)]

    def norm(width: int) -> list[Tensor]:
        return [1 + draw(width, scale=0.1), draw(width, scale=0.1)]

    found: dict[str, tuple[Operator, list[Any]]] = {}
    branches = (("spatial", (28, 28), 512, [14, 14]), ("spectral", (1, 512), 784, [1, 512]))
    for name, side, width, window in branches:
        x, count = draw(batch, *side, width), side[0] * side[1]
        qkv, mlp = layer(width, 3 * width), [*layer(width, 4 * width), *layer(4 * width, width)]
        found[f"{name} norm_linear"] = NORM_LINEAR, [x, *norm(width), *qkv, 1e-5]
        wide = draw(batch, *side, 3 * width)
        found[f"{name} window_attention"] = WINDOW_ATTENTION, [wide, None, 8, window]
        found[f"{name} linear_add"] = LINEAR_ADD, [x, *layer(width, width), x.clone()]
        found[f"{name} feed_forward"] = FEED_FORWARD, [x, *norm(width), *mlp, True, 1e-5]
        found[f"{name} attribute_match"] = (
            ATTRIBUTE_MATCH,
            [
                x.reshape(batch, count, width), draw(196, width // 2), *norm(width),
                layer(width, 2 * (width // 2))[0], 1e-5,
            ],
        )  # fmt: skip
    found["27 x 27 window_attention"] = (
        WINDOW_ATTENTION,
        [draw(batch, 27, 27, 1536), draw(1536), 8, [14, 14]],
    )
    return found


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(operator: Operator, args: Sequence[Any], backend: str) -> tuple[Any, Any]:
    """Functions that run forward, and forward and backward of everything."""
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = operator(*leaves, backend=backend)
        return out

    upstream = torch.randn_like(forward())

    def both() -> object:
        out = operator(*leaves, backend=backend)
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return torch.autograd.grad(out, wanted, upstream)

    return forward, both


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, batch {options.batch}; eager / cpp, medians in ms")
    for dtype in (getattr(torch, name) for name in options.dtype.split(",")):
        for name, (operator, args) in cases(options.batch, dtype).items():
            runs = {backend: measure(operator, args, backend) for backend in ("eager", "cpp")}
            error = relative_error(runs["cpp"][0](), runs["eager"][0]())
            if error > AGREEMENT[dtype]:
                raise SystemExit(f"{name} {dtype}: got a difference of {error}")
            row = f"{name:26} {str(dtype).removeprefix('torch.'):9}"
            for place, mode in enumerate(("fwd", "fwd+bwd")):
                times: dict[str, list[float]] = {backend: [] for backend in runs}
                for _ in range(ROUNDS):
                    for backend, pair in runs.items():
                        times[backend].append(1000 * seconds(pair[place]))
                eager, ours = (statistics.median(times[backend][1:]) for backend in runs)
                row += f"  {mode} {eager:7.2f} / {ours:7.2f} = {eager / ours:4.2f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()
