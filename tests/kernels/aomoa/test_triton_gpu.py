"""AoMoA's GPU backends on a GPU: accuracy by dtype, repeats, capture by a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.aomoa.ops import AOMOA
from tests.kernels import ladder
from tests.kernels.aomoa.test_aomoa import SIZES, arguments
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
BACKENDS = [name for name in ("triton", "cuda") if name in _backends.available("aomoa", "cuda")]
CASES: dict[str, dict[str, Any]] = {
    **SIZES,
    "fc1": {"tokens": 197, "width": 1024, "out": 4096, "rank": 128, "hidden": 16},
    "fc2": {"tokens": 197, "width": 4096, "out": 1024, "rank": 512, "hidden": 64},
}


def on_gpu(args: Any, dtype: torch.dtype, *, grad: bool = False) -> list[Any]:
    moved = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
    return ladder.cast(moved, dtype, grad=grad)


@pytest.mark.parametrize("gpu_backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", CASES)
def test_accuracy(size: str, dtype: torch.dtype, gpu_backend: str) -> None:
    args = arguments(**CASES[size])
    rounded = ladder.cast(ladder.cast(args, dtype), torch.float64)
    exact = ladder.run_with_gradients(AOMOA.reference, on_gpu(rounded, torch.float64, grad=True))
    plain = ladder.run_with_gradients(AOMOA.reference, on_gpu(args, dtype, grad=True))
    found = ladder.run_with_gradients(
        lambda *values: AOMOA(*values, backend=gpu_backend), on_gpu(args, dtype, grad=True)
    )
    for place, truth in enumerate(exact[0]):
        own = ladder.relative_error(plain[0][place], truth)
        error = ladder.relative_error(found[0][place], truth)
        assert error <= FORWARD_FACTOR * own + ROUND_OFF[dtype], (f"output {place}", error, own)
    for name, truth in exact[1].items():
        own = ladder.relative_error(plain[1][name], truth)
        error = ladder.relative_error(found[1][name], truth)
        assert error <= BACKWARD_FACTOR * own + ROUND_OFF[dtype], (name, error, own)


@pytest.mark.parametrize("gpu_backend", BACKENDS)
def test_repeats_bit_for_bit(gpu_backend: str) -> None:
    args = arguments(**CASES["fc1"])
    first, second = (
        ladder.run_with_gradients(
            lambda *values: AOMOA(*values, backend=gpu_backend),
            on_gpu(args, torch.bfloat16, grad=True),
        )
        for _ in range(2)
    )
    for one, two in zip(first[0], second[0], strict=True):
        assert torch.equal(one, two)
    for name, one in first[1].items():
        assert torch.equal(one, second[1][name]), name


@pytest.mark.parametrize("gpu_backend", BACKENDS)
def test_forward_and_backward_are_captured(gpu_backend: str) -> None:
    leaves = on_gpu(arguments(**CASES["fc1"]), torch.bfloat16, grad=True)

    def step() -> Tensor:
        out = AOMOA(*leaves, backend=gpu_backend)[0]
        grads: tuple[Tensor, ...] = torch.autograd.grad(out.float().square().sum(), leaves[0])
        return grads[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles and tunes
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured, step())
