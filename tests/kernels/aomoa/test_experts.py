"""Both ways the CPU kernel runs experts: on every token, and on the tokens grouped by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectralx_kernels import _backends
from spectralx_kernels.aomoa.ops import AOMOA
from tests.kernels import ladder
from tests.kernels.aomoa.test_aomoa import arguments

EVEN: dict[str, Any] = {"rank": 6, "hidden": 4}  # what products of bfloat16 take
SIZES: list[dict[str, Any]] = [
    {},
    {"tokens": 0, **EVEN},
    {"tokens": 1, "experts": 8, **EVEN},
    {"tokens": 70, "experts": 1, "top_k": 1, **EVEN},
    {"tokens": 70, "experts": 2, "top_k": 1, **EVEN},
    {"tokens": 70, "experts": 3, "top_k": 3, **EVEN},
    {"tokens": 70, "experts": 6, "noisy": False, **EVEN},
    {"tokens": 70, "experts": 9, "top_k": 4, "rank": 19, "hidden": 5},
    {"tokens": 70, "experts": 9, "top_k": 3, "attributes": 3, "width": 36, "out": 12, **EVEN},
    {"tokens": 70, "experts": 7, "top_k": 6, "attributes": 1, "rank": 70, "hidden": 68},
    {"tokens": 1030, "experts": 9, "attributes": 2, **EVEN},
]
NOISE = 11  # its place among the arguments


def routed(push: float, expert: int) -> tuple[Any, ...]:
    """Arguments whose noise moves one expert's logits far up or down."""
    args = arguments(tokens=70, experts=5, **EVEN)
    args[NOISE][..., expert] = push
    return args


def decided(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those tokens whose choice of experts bfloat16 cannot overturn: no near tie at the k-th."""
    *tensors, top_k, eps = args
    experts = args[9].shape[2]
    if top_k == experts or not args[0].shape[0]:
        return args
    gates = AOMOA(*tensors, top_k + 1, eps, backend="eager")[1].sort(-1).values
    kept = (gates[..., -top_k - 1] < 0.7 * gates[..., -top_k]).all(0)
    assert kept.sum() > 1
    noise = tensors[NOISE] if tensors[NOISE] is None else tensors[NOISE][:, kept]
    return (args[0][kept], *tensors[1:NOISE], noise, *args[NOISE + 1 :])


def test_sizes() -> None:
    for size in SIZES:
        ladder.check_accuracy(AOMOA, arguments(**size), torch.float32)
        if size.get("tokens") != 1:
            ladder.check_accuracy(AOMOA, decided(arguments(**size)), torch.bfloat16)
    ladder.check_gradients(AOMOA, arguments(tokens=2, experts=5))


def test_routing() -> None:
    """An expert without tokens; all tokens on one expert, whose other gate is below the floor."""
    idle, crowded = routed(-1e3, 2), routed(1e3, 3)
    load = AOMOA(*ladder.cast(idle, torch.float32), backend="cpp")[1].count_nonzero(1)
    assert not load[:, 2].any()
    gates = AOMOA(*ladder.cast(crowded, torch.float32), backend="cpp")[1]
    assert torch.equal(gates, torch.eye(5)[3].expand_as(gates))
    for args in (idle, crowded):
        for dtype in (torch.float32, torch.bfloat16):
            ladder.check_accuracy(AOMOA, args, dtype)


def test_nan() -> None:
    """A NaN token makes its own row NaN, and every other row is what it is without it."""
    for dtype in (torch.float32, torch.bfloat16):
        args = arguments(tokens=70, experts=9, noisy=False, **EVEN)
        clean = ladder.cast(args, dtype, grad=True)
        args[0][40, 3] = float("nan")
        spoilt = ladder.cast(args, dtype, grad=True)
        others = torch.arange(70) != 40
        before, after = (
            ladder.run_with_gradients(lambda *values: AOMOA(*values, backend="cpp"), values)
            for values in (clean, spoilt)
        )
        assert after[0][0][40].isnan().all()
        assert torch.equal(after[0][0][others], before[0][0][others])
        before_grad, after_grad = before[1]["argument 0"], after[1]["argument 0"]
        assert after_grad[40].isnan().any()
        assert torch.equal(after_grad[others], before_grad[others])
        # fc1 and fc2 of the experts it may have taken: NaN may not be lost in sums over tokens.
        for position in (12, 14):
            assert after[1][f"argument {position}"].isnan().flatten(1).any(1).sum() >= 2


def test_bits() -> None:
    """Same bits again, and on one thread and on two."""
    for dtype in (torch.float32, torch.bfloat16):
        args = arguments(tokens=1030, experts=9, **{**EVEN, "rank": 130})
        results = []
        before = torch.get_num_threads()
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            leaves = ladder.cast(args, dtype, grad=True)
            results.append(
                ladder.run_with_gradients(lambda *values: AOMOA(*values, backend="cpp"), leaves)
            )
        torch.set_num_threads(before)
        for outputs, grads in results[1:]:
            for one, two in zip(results[0][0], outputs, strict=True):
                assert torch.equal(one, two)
            for name, grad in results[0][1].items():
                assert torch.equal(grad, grads[name]), name


pytestmark = pytest.mark.skipif(
    "cpp" not in _backends.available(AOMOA.name, "cpu"), reason="no C++ kernel was built"
)


@pytest.fixture(params=["dense", "grouped"], autouse=True)
def experts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SPECTRALX_AOMOA_EXPERTS", request.param)
    return str(request.param)


def test_an_unknown_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRALX_AOMOA_EXPERTS", "sparse")
    with pytest.raises(RuntimeError, match="EXPERTS: got sparse, expected dense or grouped"):
        AOMOA(*ladder.cast(arguments(), torch.float32), backend="cpp")
