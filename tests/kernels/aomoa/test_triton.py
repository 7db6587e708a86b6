"""AoMoA's Triton kernels in the interpreter: what the ladder's sizes and defaults do not reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spectralx_kernels import _backends
from spectralx_kernels.aomoa import reference
from spectralx_kernels.aomoa.ops import AOMOA
from tests.kernels import ladder
from tests.kernels.aomoa.test_aomoa import arguments

if "triton" not in _backends.available("aomoa", "cpu"):
    pytest.skip("Triton's interpreter is not on", allow_module_level=True)

from spectralx_kernels.aomoa import triton as kernels
from spectralx_kernels.aomoa import triton_forward as forward
from spectralx_kernels.aomoa import triton_layer as layers
from spectralx_kernels.aomoa.triton_layer import Tiles

# More than one tile of tokens, chunk of the rank, chunk of the hidden layer and split of the rows.
CHUNKED: dict[str, Any] = {
    "tokens": 37, "width": 40, "rank": 35, "hidden": 33, "experts": 5, "top_k": 3
}  # fmt: skip


def test_sizes_beyond_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_DOWN_COLUMNS", 16)
    monkeypatch.setattr(kernels, "_SPLIT_ROWS", 32)
    for module in (forward, kernels):
        monkeypatch.setattr(module, "SMALL", Tiles(32, 32, 32, joint=64))
    ladder.check_accuracy(AOMOA, arguments(**CHUNKED), torch.float32)


WAYS: dict[str, dict[str, Any]] = {
    "one product for W and up": {"UNPROVEN": True},
    "up apart": {"UNPROVEN": True, "MANY": 10**9},
    "down product before": {"UNPROVEN": True, "_IN_ONE": 0},
    "backward's columns in chunks": {"UNPROVEN": True, "_Z_COLUMNS": 16},
    "chunks of the rank": {"UNPROVEN": False},
}


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WAYS[way].items():
        module = next(m for m in (layers, forward, kernels) if hasattr(m, name))
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize(("attributes", "bias"), [(1, False), (2, True), (3, True)])
@pytest.mark.parametrize("way", WAYS)
def test_every_way(way: str, attributes: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    take(way, monkeypatch)
    args = arguments(
        21, 12 * attributes, 24 * attributes, attributes=attributes, rank=18, bias=bias
    )
    ladder.check_accuracy(AOMOA, args, torch.float32)


def test_experts_unrolled_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tokens=19)
    for unrolled in (layers.MOST_UNROLLED, 0):
        monkeypatch.setattr(layers, "MOST_UNROLLED", unrolled)
        ladder.check_accuracy(AOMOA, args, torch.float32)


Backward = Callable[[list[bool]], list[torch.Tensor]]


@pytest.fixture(scope="module")
def backward() -> Backward:
    """Gradients of out and load by mask."""
    args = ladder.cast(arguments(tokens=3), torch.float32)
    out, gates, load, normed, statistics = kernels.aomoa(*args)
    upstream = [torch.ones_like(out), None, torch.ones_like(load)]
    saved = [gates, normed, statistics]
    return lambda mask: kernels.aomoa_backward(upstream, *args, saved, mask)


@pytest.fixture(scope="module")
def everything(backward: Backward) -> list[torch.Tensor]:
    return backward([True] * 17 + [False] * 2)


@pytest.mark.parametrize("only", range(17))
def test_a_single_gradient(backward: Backward, everything: list[torch.Tensor], only: int) -> None:
    """Any one gradient alone is the one among all, and nothing else is returned."""
    (alone,) = backward([place == only for place in range(19)])
    assert torch.equal(alone, everything[only])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [1e2, 1e3])
def test_large_mean_of_a_row_does_not_cancel(
    offset: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token's own mean dwarfs its deviations: norm1 is as exact as the reference's."""
    take(way, monkeypatch)
    args = list(arguments(tokens=4, width=160, out=320, rank=8))
    args[0] = args[0] + offset * torch.tensor([[1.0], [-1.0], [3.0], [0.0]], dtype=torch.float64)
    narrow = ladder.cast(args, torch.float32)
    exact = reference.aomoa_saving(*ladder.cast(narrow, torch.float64))
    plain = reference.aomoa_saving(*narrow)
    found = kernels.aomoa(*narrow)
    for place in (3, 4):  # normed, statistics
        own = ladder.relative_error(plain[place], exact[place])
        assert ladder.relative_error(found[place], exact[place]) <= 2 * own + 2e-6


def test_what_is_not_taken_is_refused_by_name() -> None:
    args = ladder.cast(arguments(), torch.float64)
    with pytest.raises(RuntimeError, match=r"takes torch.float32 on a CPU, got torch.float64"):
        AOMOA(*args, backend="triton")
    with pytest.raises(TypeError, match=r"x: got dtype torch.float64"):
        kernels.aomoa(*args)
    mixed = ladder.cast(arguments(), torch.float32)
    mixed[3] = mixed[3].half()
    with pytest.raises(TypeError, match=r"scaler: got dtype torch.float16, expected torch.float32"):
        kernels.aomoa(*mixed)
    many = ladder.cast(arguments(experts=257), torch.float32)
    with pytest.raises(ValueError, match="gate: got 257 experts, expected at most 256"):
        kernels.aomoa(*many)


def test_uninitialised_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers start as NaN; experts that no token takes, and rows past the end, leave them so."""
    args = list(ladder.cast(arguments(tokens=3, experts=6, top_k=1), torch.float32))
    expected = ladder.run_with_gradients(
        reference.aomoa, ladder.cast(args, torch.float32, grad=True)
    )
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        made = new_empty(self, *shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    out, gates, load, normed, statistics = kernels.aomoa(*args)
    torch.testing.assert_close(out, expected[0][0], rtol=1e-4, atol=1e-5)
    grads = kernels.aomoa_backward(
        [torch.ones_like(out), torch.ones_like(gates), torch.ones_like(load)],
        *args, [gates, normed, statistics], [True] * 17 + [False] * 2,
    )  # fmt: skip
    assert all(grad.isfinite().all() for grad in grads)
