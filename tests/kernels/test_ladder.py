"""The ladder itself: faults planted in a backend, or in the reference on a GPU, are seen."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx_kernels import _backends
from tests.kernels import ladder

ARGS = [torch.linspace(-2, 3, 96, dtype=torch.float64).view(16, 6).sin(),
        torch.linspace(-1, 2, 24, dtype=torch.float64).view(4, 6).cos(),
        torch.linspace(-1, 1, 4, dtype=torch.float64)]  # fmt: skip
NAMES = ("x", "weight", "bias")
Change = Callable[[Tensor], Tensor]


def reference(x: Tensor, weight: Tensor, bias: Tensor, *, scale: float = 1.0) -> Tensor:
    """A batch norm after a projection, whose bias has no gradient in exact arithmetic."""
    return F.batch_norm(F.linear(x, weight, bias) * scale, None, None, training=True)


def check(
    monkeypatch: pytest.MonkeyPatch, faults: dict[str, tuple[str, Change]], device: str = "cpu",
    run: Callable[..., Tensor] = reference,
) -> None:  # fmt: skip
    """`check_accuracy` with the gradients of one argument of some backends changed."""

    def call(*args: Tensor, backend: str = "kernel") -> Tensor:
        given = [arg + 0 for arg in args]
        if backend in faults:
            name, change = faults[backend]
            given[NAMES.index(name)].register_hook(change)
        return run(*given)

    class Planted(SimpleNamespace):
        def __call__(self, *args: Tensor, backend: str) -> Tensor:
            return call(*args, backend=backend)

    monkeypatch.setattr(_backends, "available", lambda *_: ["kernel", "eager"])
    monkeypatch.setattr(ladder, "moved", lambda args, device: list(args))
    operator: Any = Planted(name="planted", op=call, reference=run)
    ladder.check_accuracy(operator, ARGS, torch.float32, device)


def off(by: float) -> Change:
    """Of the largest gradient of the call, which is about 10."""
    return lambda grad: grad + by * 10


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gradient_that_cancels_is_held_against_the_others(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(monkeypatch, {}, device)
    check(monkeypatch, {"kernel": ("bias", lambda grad: -8 * grad)}, device)
    for by in (1e-4, -1e-5, float("nan")):
        with pytest.raises(AssertionError, match=r"kernel.*gradient of argument 2"):
            check(monkeypatch, {"kernel": ("bias", off(by))}, device)
    with pytest.raises(AssertionError, match=r"eager.*gradient of argument 2"):
        check(monkeypatch, {"eager": ("bias", off(1e-4))}, device)


def test_where_nothing_is_expected_anything_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def unused_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference(x, weight, bias * 0)

    check(monkeypatch, {}, run=unused_bias)
    with pytest.raises(AssertionError, match="gradient of argument 2"):
        check(monkeypatch, {"kernel": ("bias", lambda grad: grad + 1e-9)}, run=unused_bias)


def test_errors_of_the_reference_on_a_gpu_count_within_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rounded(by: float) -> tuple[str, Change]:
        return "weight", lambda grad: grad + by * grad.abs().max()

    small, large = rounded(3e-6), rounded(6e-6)
    for faults in ({"kernel": large}, {"eager": large}):
        with pytest.raises(AssertionError, match="gradient of argument 1"):
            check(monkeypatch, faults)  # on a CPU
    check(monkeypatch, {"kernel": large, "eager": small}, "cuda")
    for faults in (
        {"kernel": large},
        {"kernel": rounded(3e-5), "eager": small},
        {"eager": rounded(1e-3)},
        {"kernel": rounded(1e-3), "eager": rounded(1e-3)},
    ):
        with pytest.raises(AssertionError, match="gradient of argument 1"):
            check(monkeypatch, faults, "cuda")
