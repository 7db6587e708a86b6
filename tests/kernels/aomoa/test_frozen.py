"""The frozen layer inside `AoMoALinear`: its gradients on request, and never an old weight.

A backend may keep what it derives from a weight (a packed copy) between calls. These tests change
weights in every way PyTorch allows, and each must be seen by the next call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx_kernels import AoMoALinear, use_backend
from spectralx_kernels.aomoa.ops import AOMOA
from tests.kernels.aomoa.running import assert_close, run
from tests.kernels.aomoa.test_aomoa import layer
from tests.kernels.ladder import relative_error
from tests.tolerances import ROUND_OFF

OPERATOR = AOMOA  # what the `backend` argument ranges over


def test_unfrozen_layer_gets_its_gradients(backend: str) -> None:
    made, x = layer().eval(), torch.randn(5, 64)
    made.linear.requires_grad_(True)
    upstream = torch.randn(5, 48)
    made(x).backward(upstream)
    assert made.linear.weight.grad is not None
    assert made.linear.bias.grad is not None
    assert relative_error(made.linear.weight.grad, upstream.T.double() @ x.double()) < 2e-6
    assert relative_error(made.linear.bias.grad, upstream.double().sum(0)) < 2e-6


def other_values(made: AoMoALinear) -> dict[str, Tensor]:
    return {name: 1.5 * value + 0.1 for name, value in made.linear.state_dict().items()}


def optimizer_step(made: AoMoALinear) -> None:
    made.linear.requires_grad_(True)
    optimizer = torch.optim.AdamW(made.linear.parameters(), lr=0.5)
    made(torch.randn(5, 64)).square().sum().backward()
    optimizer.step()
    made.zero_grad()
    made.linear.requires_grad_(False)


def replace_data(made: AoMoALinear) -> None:
    made.linear.weight.data = 1.5 * made.linear.weight.detach() + 0.1


def through_a_dtype(made: AoMoALinear) -> None:
    made.to(torch.bfloat16)
    made.linear.weight.data.mul_(2)
    made.to(torch.float32)


def through_numpy(made: AoMoALinear) -> None:
    made.linear.weight.detach().numpy()[...] *= 2


def new_layer(made: AoMoALinear) -> None:
    made.linear = nn.Linear(64, 48).requires_grad_(False)


# `.data` and numpy change values without a trace in the tensor's version or address.
CHANGES: dict[str, Callable[[AoMoALinear], object]] = {
    "mul_": lambda made: made.linear.weight.mul_(2),
    "one element": lambda made: made.linear.weight[3, 5].add_(100),
    "bias": lambda made: made.linear.bias.add_(3),
    "data.mul_": lambda made: made.linear.weight.data.mul_(2),
    "data.copy_": lambda made: made.linear.weight.data.copy_(torch.randn(48, 64)),
    "data =": replace_data,
    "numpy": through_numpy,
    "load_state_dict": lambda made: made.linear.load_state_dict(other_values(made)),
    "assign": lambda made: made.linear.load_state_dict(other_values(made), assign=True),
    "optimizer": optimizer_step,
    "to and back": through_a_dtype,
    "another layer": new_layer,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_frozen_weight_is_seen(change: str, backend: str) -> None:
    """Whatever a backend keeps between calls, it is never an old weight."""
    made, x, noise = layer(), torch.randn(5, 64), torch.randn(2, 5, 4)
    for _ in range(3):  # whatever is kept is kept by now, for training and for evaluation
        before = run(made, x, noise)
        with torch.no_grad():
            made(x, noise)
    with torch.enable_grad() if change == "optimizer" else torch.no_grad():
        CHANGES[change](made)
    with torch.no_grad():
        without_autograd = made(x, noise)
    found = run(made, x, noise)
    with use_backend("eager"):
        expected = run(copy.deepcopy(made), x, noise)
    assert relative_error(expected["out"], before["out"]) > 1e-2
    assert_close(found, expected)
    assert torch.equal(without_autograd, found["out"])


def test_changed_adapter_is_seen(backend: str) -> None:
    made, x, noise = layer(), torch.randn(5, 64), torch.randn(2, 5, 4)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    for _ in range(3):
        made(x, noise).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found = run(made, x, noise)
        with use_backend("eager"):
            assert_close(found, run(copy.deepcopy(made), x, noise))


def test_layers_that_come_and_go_are_not_confused(backend: str) -> None:
    """A new weight often lies at the address of one that was freed."""
    x, addresses = torch.randn(5, 64), []
    for seed in range(8):
        torch.manual_seed(seed)
        made = AoMoALinear(nn.Linear(64, 48)).eval()
        nn.init.zeros_(made.scaler)
        with torch.no_grad():
            out = made(x)
        expected = F.linear(x, made.linear.weight, made.linear.bias)
        assert relative_error(out, expected) <= 10 * ROUND_OFF[torch.float32]
        addresses.append(made.linear.weight.data_ptr())
        del made
    assert len(set(addresses)) < len(addresses), "the allocator did not reuse memory"


def test_inference_mode(backend: str) -> None:
    made, x = layer().eval(), torch.randn(5, 64)
    expected = made(x).detach()
    with torch.inference_mode():
        assert torch.equal(made(x), expected)
        inside = copy.deepcopy(made)  # inference tensors: no version counter
        assert torch.equal(inside(x), expected)
        inside.linear.weight.mul_(2)
        assert not torch.equal(inside(x), expected)
    out = made(x)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


@pytest.mark.parametrize("name", ["linear.weight", "fc1_weight", "down.weight"])
def test_change_between_forward_and_backward_is_refused(name: str, backend: str) -> None:
    made = layer()
    out = made(torch.randn(5, 64, requires_grad=True))
    with torch.no_grad():
        made.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_threads_share_a_layer(backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton's interpreter runs one kernel at a time in a process")
    made, xs = layer().eval(), torch.randn(16, 5, 64)
    with torch.no_grad():
        expected = [made(x) for x in xs]
        fresh = layer().eval()  # nothing kept yet: the threads race to keep it

        def one(x: Tensor) -> Tensor:
            with torch.no_grad():
                out: Tensor = fresh(x)
            return out

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(one, xs))
    for one_found, one_expected in zip(found, expected, strict=True):
        assert torch.equal(one_found, one_expected)
