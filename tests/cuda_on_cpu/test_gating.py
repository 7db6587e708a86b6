"""CUDA kernels of noisy_topk_gating, run on the CPU, against the reference."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels.aomoa import reference
from tests.cuda_on_cpu.build import ROOT, compile_cuda, compiler, load
from tests.cuda_on_cpu.device import TYPE_CODES, Device
from tests.kernels.ladder import relative_error
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
DTYPES = list(TYPE_CODES)
Arguments = tuple[Tensor, Tensor | None, Tensor | None, int]
CASES = {  # attributes, tokens, experts, top_k, noisy
    "paper": (2, 19, 4, 2, True),
    "evaluation": (2, 131, 4, 2, False),
    "one expert": (1, 3, 1, 1, True),
    "all experts": (2, 5, 3, 3, True),
    "odd": (3, 37, 7, 3, True),
    "many": (1, 33, 67, 5, True),
    "one token": (2, 1, 5, 1, True),
    "no token": (2, 0, 4, 2, True),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    source = ROOT / "csrc" / "cuda" / "aomoa" / "gating.cu"
    loaded = load(compile_cuda([source], "-O1", "-shared"))
    loaded.spectralx_gating_blocks.restype = ctypes.c_int64
    return loaded


def draw(case: str, dtype: torch.dtype) -> Arguments:
    attributes, tokens, experts, top_k, noisy = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    shape = (3, attributes, tokens, experts)
    clean, raw_std, noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return (clean, raw_std, noise, top_k) if noisy else (clean, None, None, top_k)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(library: ctypes.CDLL, arguments: Arguments) -> tuple[Tensor, Tensor]:
    device = Device(library)
    clean, raw_std, noise, top_k = arguments
    attributes, tokens, experts = clean.shape
    code, dtype = TYPE_CODES[clean.dtype], wide(clean.dtype)
    blocks = library.spectralx_gating_blocks(code, ctypes.c_int64(tokens), ctypes.c_int64(experts))
    gates, load = device.empty(clean.shape, dtype), device.empty((attributes, experts), dtype)
    device.run(
        "spectralx_gating_forward", ctypes.c_int(code), device.put(clean), device.put(raw_std),
        device.put(noise), attributes, tokens, experts, top_k, gates, load,
        device.empty((attributes, blocks, experts), dtype),
    )  # fmt: skip
    return gates, load


def backward(
    library: ctypes.CDLL, arguments: Arguments, gates_grad: Tensor | None, load_grad: Tensor | None
) -> list[Tensor]:
    device = Device(library)
    clean, raw_std, noise, top_k = arguments
    code = ctypes.c_int(TYPE_CODES[clean.dtype])
    results = [device.empty(clean.shape, clean.dtype) for _ in range(1 if noise is None else 3)]
    device.run(
        "spectralx_gating_backward", code, device.put(gates_grad), device.put(load_grad),
        device.put(clean), device.put(raw_std), device.put(noise), *clean.shape, top_k,
        *results, *[None] * (3 - len(results)),
    )  # fmt: skip
    return results


def referred(arguments: Arguments, upstream: tuple[Tensor, Tensor]) -> tuple[Any, list[Tensor]]:
    leaves = [arg.clone().requires_grad_() for arg in arguments[:3] if arg is not None]
    clean, raw_std, noise = leaves if len(leaves) == 3 else (leaves[0], None, None)
    gates, load = reference.noisy_topk_gating(clean, raw_std, noise, arguments[3])
    total = (gates * upstream[0].to(gates)).sum()
    if load.requires_grad:
        total = total + (load * upstream[1].to(load)).sum()
    grads = torch.autograd.grad(total, leaves)
    return (gates.detach(), load.detach()), list(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(library: ctypes.CDLL, case: str, dtype: torch.dtype) -> None:
    arguments = draw(case, dtype)
    exactly = tuple(a.double() if isinstance(a, Tensor) else a for a in arguments)
    shape = arguments[0].shape
    generator = torch.Generator().manual_seed(1)
    upstream = (
        torch.randn(shape, generator=generator).to(wide(dtype)),
        torch.randn(shape[0], shape[2], generator=generator).to(wide(dtype)),
    )
    exact, exact_grads = referred(exactly, upstream)  # type: ignore[arg-type]
    plain, plain_grads = referred(arguments, upstream)
    found = forward(library, arguments)
    for name, ours, eager, truth in zip(("gates", "load"), found, plain, exact, strict=True):
        bound = FORWARD_FACTOR * relative_error(eager, truth) + ROUND_OFF[dtype]
        assert relative_error(ours, truth) <= bound, name
    grads = backward(library, arguments, *upstream)
    names = ("clean", "raw_std", "noise")
    for name, ours, eager, truth in zip(names, grads, plain_grads, exact_grads, strict=False):
        bound = BACKWARD_FACTOR * relative_error(eager, truth) + ROUND_OFF[dtype]
        assert relative_error(ours, truth) <= bound, name


def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL) -> None:
    arguments = draw("odd", torch.float32)
    gates_grad, load_grad = torch.randn(3, 37, 7), torch.randn(3, 7)
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        runs.append(
            (*forward(library, arguments), *backward(library, arguments, gates_grad, load_grad))
        )
    library.spectralx_shim_order(0)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_gradient_may_be_missing(library: ctypes.CDLL) -> None:
    arguments = draw("odd", torch.float64)
    gates_grad, load_grad = torch.randn(3, 37, 7).double(), torch.randn(3, 7).double()
    both = backward(library, arguments, gates_grad, load_grad)
    alone = [
        backward(library, arguments, gates_grad, None),
        backward(library, arguments, None, load_grad),
    ]
    for whole, first, second in zip(both, *alone, strict=True):
        torch.testing.assert_close(whole, first + second)


def test_ties_go_to_the_lowest_index(library: ctypes.CDLL) -> None:
    gates, load = forward(library, (torch.zeros(2, 5, 6), None, None, 3))
    assert torch.equal(gates, torch.tensor([1 / 3] * 3 + [0.0] * 3).expand(2, 5, 6))
    assert load.tolist() == [[5.0] * 3 + [0.0] * 3] * 2


def test_small_gates_become_zero_and_pass_nothing(library: ctypes.CDLL) -> None:
    clean = torch.tensor([0.0, 20.0, -3.0]).expand(1, 4, 3).contiguous()
    gates, load = forward(library, (clean, None, None, 2))
    assert gates.tolist() == [[[0.0, 1.0, 0.0]] * 4]
    assert load.tolist() == [[0.0, 4.0, 0.0]]
    (grad,) = backward(library, (clean, None, None, 2), torch.randn(1, 4, 3), None)
    _, (expected,) = referred((clean, None, None, 2), (torch.zeros(1, 4, 3), load))
    assert grad[..., 0].abs().max() < 1e-4
    assert torch.equal(expected, torch.zeros_like(expected))


def test_nan_stays_in_its_row(library: ctypes.CDLL) -> None:
    arguments = draw("odd", torch.float32)
    arguments[0][1, 4, 2] = torch.nan
    found, (expected, _) = (
        forward(library, arguments),
        referred(arguments, (torch.zeros(3, 37, 7), torch.zeros(3, 7))),
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert found[0][1, 4].isnan().any()
    assert not found[0][1, :4].isnan().any()
