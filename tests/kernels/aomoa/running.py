"""What the tests of `AoMoALinear` share: one run with all gradients, and two ways to compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.kernels.ladder import relative_error
from tests.tolerances import ROUND_OFF


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    module.zero_grad()
    return found


def run(module: nn.Module, *inputs: Tensor, call: Callable[..., Tensor] | None = None) -> dict:
    """Output and all gradients, the input's included, for the loss of squares."""
    x = inputs[0].detach().clone().requires_grad_()
    out = (module if call is None else call)(x, *inputs[1:])
    out.float().square().sum().backward()
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **gradients(module)}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within round-off of float32, relative to the largest value of each."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) <= 10 * ROUND_OFF[torch.float32], name
