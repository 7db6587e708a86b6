"""noisy_topk_gating: every backend against the reference, and the edges of routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralx_kernels import noisy_topk_gating
from spectralx_kernels.aomoa.ops import GATING
from spectralx_kernels.aomoa.reference import noisy_topk_gating as reference
from tests.kernels import ladder
from tests.kernels.aomoa.by_name import gating_arguments as arguments


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_ladder(top_k: int, noisy: bool) -> None:
    args = arguments(top_k=top_k, noisy=noisy)
    ladder.check_contract(GATING, args)
    ladder.check_gradients(GATING, args)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ladder.check_accuracy(GATING, args, dtype)
    ladder.check_repeats(GATING, args)


@given(
    attributes=st.integers(1, 3),
    tokens=st.sampled_from([0, 1, 255, 256, 257, 600]),
    experts=st.integers(1, 9),
    noisy=st.booleans(),
    data=st.data(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_size(
    attributes: int, tokens: int, experts: int, noisy: bool, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    args = arguments(attributes, tokens, experts, top_k, noisy)
    ladder.check_accuracy(GATING, args, torch.float32)


def test_compiles() -> None:
    args = arguments()[:3]
    ladder.check_compiles(lambda *values: noisy_topk_gating(*values, top_k=2), args)


def test_ties_go_to_the_lowest_index(backend: str) -> None:
    gates, load = noisy_topk_gating(torch.zeros(2, 5, 6), top_k=2, backend=backend)
    assert torch.equal(gates[..., :2], torch.full((2, 5, 2), 0.5))
    assert torch.equal(gates[..., 2:], torch.zeros(2, 5, 4))
    assert torch.equal(load, torch.tensor([5.0, 5, 0, 0, 0, 0]).expand(2, 6))


def test_tie_at_the_threshold_takes_the_lower(backend: str) -> None:
    clean = torch.tensor([[[1.0, 3.0, 1.0, 1.0]]])
    gates, _ = noisy_topk_gating(clean, top_k=2, backend=backend)
    assert gates[0, 0].nonzero().flatten().tolist() == [0, 1]


def test_small_gates_become_zero_without_renormalising(backend: str) -> None:
    clean = torch.tensor([[[10.0, 0.0, -5.0]]], requires_grad=True)
    gates, load = noisy_topk_gating(clean, top_k=2, backend=backend)
    largest = torch.softmax(torch.tensor([10.0, 0.0]), 0)[0]
    torch.testing.assert_close(gates[0, 0], torch.stack([largest, largest * 0, largest * 0]))
    assert load[0].tolist() == [1, 0, 0]
    gates.sum().backward()  # the zeroed gate passes no gradient, the softmax around it does
    assert clean.grad is not None
    torch.testing.assert_close(clean.grad[0, 0, 0], largest * (1 - largest), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_are_never_hidden(value: float, backend: str) -> None:
    clean = torch.tensor([[[0.0, value, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]]])
    gates, _ = noisy_topk_gating(clean, top_k=2, backend=backend)
    expected, _ = reference(clean, None, None, 2)
    assert torch.equal(gates.isnan(), expected.isnan())
    assert gates[0, 0].isnan().any() == (value > 0 or value != value)
    assert gates[0, 1].isfinite().all()


def test_magnitudes_to_1e4_stay_finite(backend: str) -> None:
    clean, raw_std, noise, _ = arguments(tokens=50)
    assert raw_std is not None
    assert noise is not None
    args = [(1e4 * value).float().requires_grad_() for value in (clean, raw_std, noise)]
    gates, load = noisy_topk_gating(*args, top_k=2, backend=backend)
    (gates.square().sum() + load.square().sum()).backward()
    assert gates.isfinite().all()
    assert load.isfinite().all()
    for arg in args:
        assert arg.grad is not None
        assert arg.grad.isfinite().all()


def test_load_does_not_depend_on_threads() -> None:
    clean, raw_std, noise, top_k = arguments(tokens=5000)
    threads = torch.get_num_threads()
    loads = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            loads.append(noisy_topk_gating(clean, raw_std, noise, top_k=top_k)[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(loads[0], loads[1])


def test_non_contiguous_input(backend: str) -> None:
    clean, raw_std, noise, top_k = arguments(tokens=9)
    assert raw_std is not None
    assert noise is not None
    swapped = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in (clean, raw_std)]
    found = noisy_topk_gating(swapped[0], swapped[1], noise, top_k=top_k, backend=backend)
    expected = noisy_topk_gating(clean, raw_std, noise, top_k=top_k, backend=backend)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": torch.zeros(2, 3, 4, dtype=torch.int64)}, "clean: got dtype torch.int64"),
        ({"clean": torch.zeros(3, 4)}, r"clean: got shape \[3, 4\], expected \[attributes"),
        ({"top_k": 5}, "top_k: got 5, expected 1 to 4"),
        ({"top_k": 0}, "top_k: got 0, expected 1 to 4"),
        ({"noise": None}, "noise and raw_std: got one of them"),
        ({"noise": torch.zeros(2, 3, 5)}, r"noise: got shape \[2, 3, 5\], expected \[2, 3, 4\]"),
        ({"raw_std": torch.zeros(2, 3, 4).double()}, "raw_std: got dtype torch.float64"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    good = {"clean": torch.zeros(2, 3, 4), "raw_std": torch.zeros(2, 3, 4)}
    good["noise"] = torch.zeros(2, 3, 4)
    with pytest.raises((TypeError, ValueError), match=message):
        noisy_topk_gating(**{"top_k": 2, **good, **change})
