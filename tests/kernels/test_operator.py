"""Differentiation of operators: in C++ with the extension, in Python without, to one effect."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

# Writes what `measured` returns, with the extension or without.
_PROGRAM = """
import io, sys
if {hidden}: sys.modules["spectralx_kernels._C"] = None
import warnings; warnings.simplefilter("ignore")
import torch
from tests.kernels.test_operator import measured
buffer = io.BytesIO()
torch.save(measured(), buffer)
sys.stdout.buffer.write(buffer.getvalue())
"""


def _calls() -> dict[str, tuple[Any, list[Any]]]:
    """Operators of every kind: with hidden outputs, kept ones, inputs that are not always read."""
    from spectralx_kernels.aomoa.ops import AOMOA
    from spectralx_kernels.hypert.dense import LINEAR_ADD
    from spectralx_kernels.linear.ops import LINEAR
    from spectralx_kernels.upsample.convolution import UPSAMPLE_CONV2D, UPSAMPLE_CONV2D_MOMENTS

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, grad: bool = True) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return values.requires_grad_(grad)

    x, weight = draw(2, 3, 4, 5), draw(4, 3, 3, 3)
    resize = [[8, 10], [1, 1], False, False]
    attributes, experts, d, rank, hidden, out = 2, 4, 6, 4, 3, 8
    adapted = [
        draw(5, attributes * d), draw(out, attributes * d, grad=False), None, draw(out), draw(d),
        draw(d), draw(rank, d), draw(rank), draw(rank), draw(attributes, rank, experts),
        draw(attributes, rank, experts), None, draw(experts, hidden, rank), draw(experts, hidden),
        draw(experts, rank, hidden), draw(experts, rank), draw(out // attributes, rank), 2, 1e-5,
    ]  # fmt: skip
    return {
        "linear": (LINEAR.op, [draw(7, 6), draw(5, 6), draw(5)]),
        "linear, frozen": (LINEAR.op, [draw(7, 6), draw(5, 6, grad=False), draw(5)]),
        "addend": (LINEAR_ADD.op, [draw(7, 6), draw(5, 6), None, draw(7, 5)]),
        "not kept": (UPSAMPLE_CONV2D.op, [x, weight, None, None, *resize, False]),
        "kept": (UPSAMPLE_CONV2D.op, [x, weight, draw(4), None, *resize, True]),
        "constant": (UPSAMPLE_CONV2D_MOMENTS.op, [x, weight, draw(4), None, *resize]),
        "hidden": (AOMOA.op, adapted),
    }


def measured() -> dict[str, tuple[list[Tensor], int]]:
    """Of each call the gradients of all inputs that have one, and the bytes held for backward."""
    found = {}
    for name, (op, arguments) in _calls().items():
        held: dict[int, int] = {}

        def hold(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            outputs = op(*arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        scored = [output for output in outputs if output.requires_grad]
        upstream = [torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y) for y in scored]
        leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
        grads = torch.autograd.grad(scored, leaves, upstream)
        found[name] = ([*grads], sum(held.values()))
    return found


def test_differentiation_in_python_and_in_cpp_is_the_same() -> None:
    results = []
    for hidden in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM.format(hidden=hidden)], capture_output=True, check=True
        )
        results.append(torch.load(io.BytesIO(done.stdout)))
    for name, (expected, held) in results[0].items():
        found, bytes_held = results[1][name]
        assert bytes_held == held, name
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=name)


def test_what_backward_does_not_read_is_not_held() -> None:
    """x [7, 6] of a frozen weight: the strides of its stand-in are 2 and 1."""
    found = measured()
    (_, trained), (_, frozen) = found["linear"], found["linear, frozen"]
    assert (trained - frozen) // 8 == 7 * 6 - (6 * 2 + 5 * 1 + 1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_runs_outside_of_the_callers_autocast(device: str) -> None:
    from spectralx_kernels.linear.ops import LINEAR

    x = torch.randn(3, 4, device=device, requires_grad=True)
    weight = torch.randn(2, 4, device=device, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(LINEAR.op(x, weight, None).sum(), [x, weight])
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    if device == "cpu":
        torch.testing.assert_close(grads[0], weight.sum(0).expand(3, 4))


def test_compiled_autograd_traces_backward() -> None:
    arguments = _calls()["hidden"][1]
    leaves = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
    expected = measured()["hidden"][0]
    out, gates, load, *_ = _calls()["hidden"][0](*arguments)
    scored = [output for output in (out, gates, load) if output.requires_grad]
    upstream = [torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y) for y in scored]
    compiler = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        torch.autograd.backward(scored, upstream)
    for leaf, grad in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
