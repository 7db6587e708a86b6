"""The linear layer: contract, gradients, accuracy, what it keeps, which backend runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx_kernels import Linear, linear
from spectralx_kernels.linear import ops
from spectralx_kernels.linear.ops import LINEAR, _prefer
from tests.kernels import ladder

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def arguments(*rows: int, width: int = 5, out: int = 3, bias: bool = True) -> list[Any]:
    return [draw(*rows, width), draw(out, width), draw(out) if bias else None]


@pytest.mark.parametrize("rows", [(2, 3), (4,), ()])
def test_ladder(rows: tuple[int, ...]) -> None:
    args = arguments(*rows, bias=bool(rows))
    ladder.check_contract(LINEAR, args)
    ladder.check_gradients(LINEAR, args)
    ladder.check_repeats(LINEAR, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(dtype: torch.dtype) -> None:
    for rows, width, out in (((1,), 1, 1), ((2, 50), 300, 70), ((7, 3, 5), 33, 129)):
        ladder.check_accuracy(LINEAR, arguments(*rows, width=width, out=out), dtype)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 2), (0, 1)])
def test_only_what_is_wanted(frozen: tuple[int, ...], backend: str) -> None:
    """Gradients of some arguments are those of all; strided rows and weights too."""
    args = [draw(4, 6, 5).transpose(0, 1), draw(5, 3).t(), draw(3, 2)[:, 0]]
    every = [arg.float().requires_grad_() for arg in args]
    some = [arg.float().requires_grad_(place not in frozen) for place, arg in enumerate(args)]
    outs = [
        F.linear(*every) if values is every else linear(*values, backend=backend)
        for values in (every, some)
    ]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    for place, (one, other) in enumerate(zip(some, every, strict=True)):
        assert (one.grad is None) == (place in frozen)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_weight_holds_no_input(trained: bool) -> None:
    x, weight, bias = (value.float() for value in arguments(50, width=40))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    weight.requires_grad_(trained)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x.requires_grad_(), weight, bias, backend="cpp")
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in kept) == trained
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} >= {weight.data_ptr()}
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept)
    assert held < x.nbytes or trained


def test_no_rows(backend: str) -> None:
    x, weight, bias = (value.float().requires_grad_() for value in arguments(2, 0))
    out = linear(x, weight, bias, backend=backend)
    assert out.shape == (2, 0, 3)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (2, 0, 5)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_a_row_that_is_not_a_number_stays_alone(backend: str) -> None:
    x, weight, bias = (value.float() for value in arguments(4))
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    out = linear(x, weight, bias, backend=backend)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("intel", [False, True])
def test_the_default_backend(monkeypatch: pytest.MonkeyPatch, intel: bool) -> None:
    """torch's own layer for little work, for types that it hands on, on Intel for many rows."""
    monkeypatch.setattr(ops, "_INTEL", intel)
    x, weight = torch.zeros(256, 128), torch.zeros(128, 128)
    assert _prefer([x, weight], torch.float32) == ("eager" if intel else None)
    assert _prefer([x.view(128, 256), torch.zeros(128, 256)], torch.float32) is None
    assert _prefer([x[:16], weight], torch.float32) == "eager"
    assert _prefer([x, weight], torch.bfloat16) == "eager"


def test_module_is_the_layer_of_torch() -> None:
    """Same state dict and values, there and back, compiled and under autocast."""
    plain, layer = nn.Linear(64, 512), Linear(64, 512)
    layer.load_state_dict(plain.state_dict())
    x = draw(3, 50, 64).float()
    results = [
        ladder.run_with_gradients(each, [x.clone().requires_grad_()]) for each in (layer, plain)
    ]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    ladder.check_compiles(layer, (x,), compiler="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_checked() -> None:
    x, weight, bias = (value.float() for value in arguments(4))
    with pytest.raises(ValueError, match=r"weight: got shape \[3, 5\], expected \[out, 4\]"):
        linear(x[:, :4], weight)
    with pytest.raises(ValueError, match=r"bias: got shape \[2\], expected \[3\]"):
        linear(x, weight, bias[:2])
    with pytest.raises(TypeError, match="x: got dtype"):
        linear(x.long(), weight)
    with pytest.raises(TypeError, match="weight: got dtype"):
        linear(x, weight.double())
    with pytest.raises(ValueError, match=r"x: got shape \[\], expected"):
        linear(x[0, 0], weight)
