"""noisy_topk_gating on a GPU: accuracy, ties, NaN, repeats, no synchronisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectralx_kernels import noisy_topk_gating
from spectralx_kernels.aomoa.ops import GATING
from tests.gpu.watching import no_synchronisation
from tests.kernels.aomoa.by_name import gating_arguments as arguments
from tests.kernels.ladder import cast, relative_error, run_with_gradients
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

OPERATOR = GATING
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(0, 4, 2), (1, 4, 2), (257, 4, 2), (600, 9, 1), (600, 9, 9), (70, 64, 5)],
)
def test_accuracy(
    tokens: int, experts: int, top_k: int, noisy: bool, dtype: torch.dtype, backend: str
) -> None:
    args = cast(arguments(2, tokens, experts, top_k, noisy), dtype)
    exact = run_with_gradients(GATING.reference, cast(args, torch.float64, grad=True))
    plain = run_with_gradients(GATING.reference, cast(args, dtype, grad=True))
    there = [arg.cuda() if isinstance(arg, Tensor) else arg for arg in args]
    found = run_with_gradients(
        lambda *values: GATING(*values, backend=backend), cast(there, dtype, grad=True)
    )
    for place, truth in enumerate(exact[0]):
        bound = FORWARD_FACTOR * relative_error(plain[0][place], truth) + ROUND_OFF[dtype]
        assert relative_error(found[0][place].cpu(), truth) <= bound, f"output {place}"
    assert found[1].keys() >= exact[1].keys()
    for name, truth in exact[1].items():
        bound = BACKWARD_FACTOR * relative_error(plain[1][name], truth) + ROUND_OFF[dtype]
        assert relative_error(found[1][name].cpu(), truth) <= bound, name


def test_ties_go_to_the_lowest_index(backend: str) -> None:
    gates, load = noisy_topk_gating(torch.zeros(2, 500, 6).cuda(), top_k=2, backend=backend)
    assert torch.equal(gates.cpu(), torch.tensor([0.5, 0.5, 0, 0, 0, 0]).expand(2, 500, 6))
    assert torch.equal(load.cpu(), torch.tensor([500.0, 500, 0, 0, 0, 0]).expand(2, 6))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_are_never_hidden(value: float, backend: str) -> None:
    clean = torch.tensor([[[0.0, value, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]]])
    gates, _ = noisy_topk_gating(clean.cuda(), top_k=2, backend=backend)
    expected, _ = noisy_topk_gating(clean, top_k=2, backend="eager")
    assert torch.equal(gates.cpu().isnan(), expected.isnan())
    assert gates[0, 1].isfinite().all()


def test_repeats_without_synchronising(backend: str) -> None:
    *drawn, top_k = arguments(2, 5000)
    leaves = [arg.float().cuda().requires_grad_() for arg in drawn if isinstance(arg, Tensor)]

    def once() -> list[Tensor]:
        gates, load = GATING(*leaves, top_k, backend=backend)
        return [gates, load, *torch.autograd.grad((gates.square().sum(), load.sum()), leaves)]

    first = once()
    with no_synchronisation():
        others = [once() for _ in range(4)]
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one, two)
