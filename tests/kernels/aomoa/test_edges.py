"""Edges of the adapted layer by name, shapes by hypothesis, on every backend of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels.aomoa.ops import AOMOA
from tests.kernels.aomoa.by_name import NAMES, changed, check_shape, named, run
from tests.kernels.aomoa.running import assert_close, assert_same_bits
from tests.kernels.aomoa.test_aomoa import arguments
from tests.kernels.ladder import cast, poisoned, relative_error, run_with_gradients
from tests.tolerances import ROUND_OFF

EXPERTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")


def constant_logits(args: Sequence[Any], logits: Sequence[float]) -> tuple[Any, ...]:
    """`args` in evaluation with these logits [E] for every token of every attribute."""
    attributes, rank, _ = args[NAMES.index("gate")].shape
    first = torch.zeros(rank, dtype=torch.float64)
    first[0] = 1
    gate = torch.zeros(attributes, rank, len(logits), dtype=torch.float64)
    gate[:, 0] = torch.tensor(logits, dtype=torch.float64)
    # norm2 puts out its bias alone, plus a little in the places the gate does not read.
    return changed(
        args,
        norm2_weight=lambda old: old * (1 - first),
        norm2_bias=lambda old: old * (1 - first) + first,
        gate=gate,
        noise=None,
    )


# Routing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True])
def test_tied_logits_of_a_fresh_layer(noisy: bool, backend: str) -> None:
    """Gates and their gradients go to the lowest indices."""
    args = changed(
        arguments(tokens=9, noisy=noisy), gate=torch.zeros_like, gate_noise=torch.zeros_like
    )
    if noisy:
        args = changed(args, noise=torch.zeros_like)
    check_shape(args)
    found = run(args, backend)
    assert torch.equal(found["gates"], torch.tensor([0.5, 0.5, 0, 0]).expand(2, 9, 4))
    assert found["fc1_weight"][:2].any()
    for name in EXPERTS:
        assert not found[name][2:].any(), name


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_takes_all_and_others_none(top_k: int, backend: str) -> None:
    args = constant_logits(arguments(tokens=70, rank=5, top_k=top_k), [0, -3, 20, -5])
    check_shape(args)
    found = run(args, backend)
    assert torch.equal(found["load"], torch.tensor([0.0, 0, 70, 0]).expand(2, 4))
    for name in EXPERTS:
        assert found[name][2].any(), name
        assert not found[name][[0, 1, 3]].any(), name


def test_gates_cut_to_zero_are_not_made_up_for(backend: str) -> None:
    """exp(-9) is about 1.2e-4 and stays, exp(-9.4) about 0.8e-4 and goes."""
    for second, left in ((-9.0, 2), (-9.4, 1)):
        args = constant_logits(arguments(tokens=6, rank=5), [0, second, -20, -30])
        check_shape(args)
        found = run(args, backend)
        assert ((found["gates"] != 0).sum(-1) == left).all()
        largest = torch.softmax(torch.tensor([0.0, second], dtype=torch.float64), 0)[0]
        assert relative_error(found["gates"][..., 0], largest.expand(2, 6)) < 1e-6
        assert bool(found["fc2_weight"][1].any()) == (left == 2)


@pytest.mark.parametrize("sign", [1.0, -1.0, None])
def test_expert_outputs_near_1e4(sign: float | None, backend: str) -> None:
    """Far outside what exp can hold, all up, all down or both."""

    def far(bias: Tensor) -> Tensor:
        return 1e4 * (bias.sign() if sign is None else sign) + bias

    for noisy in (False, True):
        args = changed(arguments(tokens=9, noisy=noisy), fc2_bias=far)
        check_shape(args)
        found = run(args, backend)
        for name, value in found.items():
            assert value.isfinite().all(), name
        assert found["out"].abs().max() > 1e3


# Sizes -------------------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "no tokens": {"tokens": 0},
    "no tokens, evaluation": {"tokens": 0, "noisy": False},
    "one token": {"tokens": 1},
    "one token, evaluation": {"tokens": 1, "noisy": False},
    "k = E": {"tokens": 33, "experts": 5, "top_k": 5},
    "rank 13, hidden 7": {"tokens": 67, "rank": 13, "hidden": 7},
    "rank 3, hidden 1": {"tokens": 5, "rank": 3, "hidden": 1},
    "rank above the width": {"tokens": 5, "rank": 40, "hidden": 50},
    "64 experts": {"tokens": 90, "experts": 64, "top_k": 2, "rank": 9},
    "64 experts, k = 9": {"tokens": 40, "experts": 64, "top_k": 9, "rank": 9},
    "64 experts, k = 64": {"tokens": 5, "experts": 64, "top_k": 64},
    "widths 33 and 21": {"tokens": 19, "width": 33, "out": 21, "attributes": 3},
}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_shape(arguments(**SIZES[size]), dtype)


def test_rank_one(backend: str) -> None:
    """norm2 of a single value puts out its bias: what lies before it gets no gradient."""
    args = arguments(tokens=5, rank=1, hidden=1)
    found, exact = run(args, backend), run(args, "eager", torch.float64)
    zero = ("norm1_weight", "norm1_bias", "down", "norm2_weight")
    for name in zero:  # round-off, times norm2's factor of a row without variance
        assert found[name].abs().max() <= ROUND_OFF[torch.float32] / 1e-5**0.5, name
    others = {name: value for name, value in exact.items() if name not in zero}
    assert_close({name: found[name] for name in others}, others)


@given(
    attributes=st.integers(1, 4),
    tokens=st.sampled_from([0, 1, 2, 31, 64, 65, 130]),
    width=st.integers(6, 40),
    out=st.integers(1, 24),
    rank=st.integers(6, 24),
    hidden=st.integers(1, 11),
    experts=st.integers(1, 9),
    noisy=st.booleans(),
    bias=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(
    attributes: int, width: int, out: int, data: st.DataObject, **sizes: Any
) -> None:
    top_k = data.draw(st.integers(1, sizes["experts"]), label="top_k")
    args = arguments(
        width=attributes * width, out=attributes * out, attributes=attributes, top_k=top_k, **sizes
    )
    check_shape(args)


# Values that are not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_stays_its_tokens_own(value: float, noisy: bool, backend: str) -> None:
    """NaN in that token's outputs and gradients; the others' are those of a run without it."""
    good = arguments(tokens=70, rank=5, noisy=noisy)
    bad = changed(
        good,
        x=lambda x: x.clone().index_put((torch.tensor(66), torch.tensor(2)), x.new_tensor(value)),
    )
    others = torch.arange(70) != 66
    found, without = run(bad, backend), run(good, backend)
    out, gates, dx = found["out"], found["gates"], found["x"]
    assert not out[66].isfinite().any()
    assert out[66, :4].isnan().all()  # the attribute with the value in it
    assert gates[0, 66].isnan().any()
    assert dx[66, :6].isnan().all()
    assert torch.equal(out[others], without["out"][others])
    assert torch.equal(gates[:, others], without["gates"][:, others])
    assert torch.equal(gates[1], without["gates"][1])
    assert torch.equal(dx[others], without["x"][others])
    assert found["load"][1].isfinite().all()
    # A sum over tokens that has the NaN in it shows it.
    for name in ("down", "norm1_weight", "norm2_weight", "gate"):
        assert found[name].isnan().any(), name
    expected = run(bad, "eager")
    for name in ("out", "gates", "load"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("name", ["noise", "gate", "fc1_weight", "fc2_bias", "up", "scaler"])
def test_nan_in_any_tensor_is_never_hidden(name: str, backend: str) -> None:
    def spoil(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[0] = torch.nan
        return spoilt

    args = changed(arguments(tokens=9), **{name: spoil})
    found, expected = run(args, backend), run(args, "eager")
    assert expected["out"].isnan().any()
    for name in ("out", "gates"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_in_an_upstream_gradient_stays_its_tokens_own(place: int, backend: str) -> None:
    leaves = cast(arguments(tokens=70, rank=5), torch.float32, grad=True)
    outputs = AOMOA(*leaves, backend=backend)
    upstream = [torch.ones_like(output) for output in outputs]
    upstream[place].select(0 if place == 0 else 1, 1)[0] = torch.nan
    (found,) = torch.autograd.grad(outputs, leaves[:1], upstream)
    assert found[1].isnan().any()
    if place != 2:  # the load is of all tokens
        assert found[torch.arange(70) != 1].isfinite().all()


# Layout, memory, what is asked for ---------------------------------------------------------------


def test_non_contiguous_tensors(backend: str) -> None:
    args = arguments(tokens=9, rank=5)

    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor

    leaves = [
        strided(leaf.detach()).requires_grad_() if isinstance(leaf, Tensor) else leaf
        for leaf in cast(args, torch.float32)
    ]
    assert not any(
        leaf.is_contiguous() for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 1
    )
    found = named(run_with_gradients(lambda *v: AOMOA(*v, backend=backend), leaves))
    assert_close(found, run(args, backend))


def test_expanded_upstream_gradient(backend: str) -> None:
    """What ``out.sum().backward()`` hands over: one number with strides of 0."""
    found = []
    for upstream in (torch.ones(()).expand(9, 8), torch.ones(9, 8)):
        leaves = cast(arguments(tokens=9), torch.float32, grad=True)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        out = AOMOA(*leaves, backend=backend)[0]
        found.append(torch.autograd.grad(out, tensors, upstream, allow_unused=True))
    for one, other in zip(*found, strict=True):
        if one is not None or other is not None:
            assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_outputs_that_are_not_used(used: tuple[int, ...], backend: str) -> None:
    """Backward without a gradient of the output, of the gates or of the load."""

    def some(run_it: Callable[..., Any]) -> Callable[..., list[Tensor]]:
        return lambda *values: [run_it(*values)[place] for place in used]

    args = arguments(tokens=9, rank=5)
    exact = run_with_gradients(some(AOMOA.reference), cast(args, torch.float64, grad=True))[1]
    found = run_with_gradients(
        some(lambda *values: AOMOA(*values, backend=backend)), cast(args, torch.float32, grad=True)
    )[1]
    for name, grad in found.items():
        truth = exact.get(name, torch.zeros_like(grad))
        assert relative_error(grad, truth) < 1e-5, name
    assert found.keys() >= exact.keys()


@pytest.mark.parametrize("noisy", [False, True])
def test_each_gradient_alone_is_the_same(noisy: bool, backend: str) -> None:
    """No gradient depends on which others are wanted."""
    args = cast(arguments(tokens=70, rank=5, noisy=noisy), torch.float32)
    together = run(args, backend)
    for place, name in enumerate(NAMES):
        if name not in together:
            continue
        leaves = list(args)
        leaves[place] = args[place].clone().requires_grad_()
        outputs = AOMOA(*leaves, backend=backend)
        # The upstream gradients of `run`; an output this argument has no part in needs none.
        generator = torch.Generator().manual_seed(0)
        drawn = [
            torch.randn(output.shape, generator=generator, dtype=torch.float64).float()
            for output in outputs
            if noisy or output is not outputs[2]
        ]
        scored = [(o, g) for o, g in zip(outputs, drawn, strict=False) if o.requires_grad]
        (alone,) = torch.autograd.grad(
            [output for output, _ in scored], leaves[place], [grad for _, grad in scored]
        )
        assert_close({name: alone}, {name: together[name]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("noisy", [False, True])
def test_poisoned_memory_gives_the_same_bits(noisy: bool, dtype: torch.dtype, backend: str) -> None:
    for tokens, experts, top_k in ((530, 4, 2), (3, 9, 3), (0, 4, 2)):
        args = arguments(tokens, rank=5, experts=experts, top_k=top_k, noisy=noisy)
        plain = run(args, backend, dtype)
        with poisoned():
            found = run(args, backend, dtype)
        assert_same_bits(found, plain)
    # Also where experts stay without tokens and gates are cut.
    args = constant_logits(arguments(tokens=70, rank=5), [0, -9.4, -20, -30])
    plain = run(args, backend, dtype)
    with poisoned():
        found = run(args, backend, dtype)
    assert_same_bits(found, plain)
