"""The whole adapted layer: contract, gradients, edges, and the drop-in module."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectralx_kernels import AoMoALinear, aomoa, balance_loss, official_parameters
from spectralx_kernels.aomoa import reference
from spectralx_kernels.aomoa.ops import AOMOA
from tests.kernels import ladder

ROOT = Path(__file__).parents[3]


def arguments(
    tokens: int = 5,
    width: int = 12,
    out: int = 8,
    *,
    attributes: int = 2,
    rank: int = 3,
    hidden: int = 2,
    experts: int = 4,
    top_k: int = 2,
    noisy: bool = True,
    bias: bool = True,
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * experts + top_k)

    def draw(*shape: int, offset: float = 0.0, scale: float = 0.5) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return offset + scale * drawn

    d = width // attributes
    return (
        draw(tokens, width, scale=1.0),
        draw(out, width),
        draw(out) if bias else None,
        draw(out, offset=1.0),
        draw(d, offset=1.0),
        draw(d),
        draw(rank, d),
        draw(rank, offset=1.0),
        draw(rank),
        draw(attributes, rank, experts),
        draw(attributes, rank, experts),
        draw(attributes, tokens, experts, scale=1.0) if noisy else None,
        draw(experts, hidden, rank),
        draw(experts, hidden),
        draw(experts, rank, hidden),
        draw(experts, rank),
        draw(out // attributes, rank),
        top_k,
        1e-5,
    )


SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "evaluation": {"noisy": False},
    "no bias": {"bias": False},
    "one attribute": {"attributes": 1},
    "three attributes": {"attributes": 3, "out": 9},
    "one expert": {"experts": 1, "top_k": 1},
    "k = 1": {"top_k": 1},
    "k = E": {"experts": 3, "top_k": 3},
    "rank 5, hidden 1": {"rank": 5, "hidden": 1},
    "no tokens": {"tokens": 0},
    "one token": {"tokens": 1},
}


@pytest.mark.parametrize("size", SIZES)
def test_accuracy(size: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ladder.check_accuracy(AOMOA, arguments(**SIZES[size]), dtype)


@pytest.mark.parametrize("size", ["plain", "evaluation", "no tokens"])
def test_contract(size: str) -> None:
    ladder.check_contract(AOMOA, arguments(**SIZES[size]))


@pytest.mark.parametrize("size", ["plain", "evaluation", "k = E"])
def test_gradients(size: str) -> None:
    ladder.check_gradients(AOMOA, arguments(tokens=2, **SIZES[size]))


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The row kernels that this processor would not choose agree too, in a process of their own."""
    code = (
        "import torch\n"
        "from tests.kernels.aomoa.by_name import check_shape\n"
        "from tests.kernels.aomoa.test_aomoa import arguments\n"
        "for size in ({}, {'tokens': 70, 'rank': 19, 'hidden': 5}, {'tokens': 40, 'rank': 18}):\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        check_shape(arguments(**size), dtype)\n"
    )
    environment = {**os.environ, "SPECTRALX_CPU_CAPABILITY": capability}
    environment.pop("TRITON_INTERPRET", None)  # C++ alone
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_chunks_join_seamlessly() -> None:
    """More tokens than a chunk holds, and not a multiple of it."""
    ladder.check_accuracy(AOMOA, arguments(tokens=1030), torch.float32)


def test_repeats() -> None:
    ladder.check_repeats(AOMOA, arguments())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size",
    [
        {"tokens": 1030, "width": 64, "out": 48, "rank": 16, "hidden": 4},
        {"tokens": 70, "width": 2304, "out": 1024, "rank": 96, "hidden": 4},
    ],
    ids=["tokens", "features"],
)
def test_threads_change_no_bit(size: dict[str, Any], dtype: torch.dtype) -> None:
    """More tokens than a chunk, panels that are not full, wide sums; products in several parts."""
    args = ladder.cast(arguments(**size), dtype)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 5, 7):
            torch.set_num_threads(count)
            runs.append(ladder.run_with_gradients(AOMOA, ladder.cast(args, dtype, grad=True)))
    finally:
        torch.set_num_threads(threads)
    for outputs, grads in runs[1:]:
        assert all(map(torch.equal, outputs, runs[0][0]))
        assert all(torch.equal(grad, grads[name]) for name, grad in runs[0][1].items())


def layer(width: int = 64, out: int = 48, **options: Any) -> AoMoALinear:
    torch.manual_seed(0)
    made = AoMoALinear(nn.Linear(width, out), **options)
    for parameter in made.parameters():  # away from the start values, where every gate ties
        nn.init.normal_(parameter, std=0.3) if parameter.requires_grad else None
    return made


def test_module_compiles_as_one_graph() -> None:
    made = layer()
    noise = torch.randn(2, 6, 4)
    ladder.check_compiles(lambda x: made(x, noise), [torch.randn(2, 3, 64)])


def test_combination_is_stable_far_outside_float32_exp() -> None:
    y = torch.tensor([1e4, -1e4, 3.0, 1e4]).view(1, 1, 4, 1).requires_grad_()
    gates = torch.tensor([0.25, 0.75, 0.0, 0.0]).view(1, 1, 4).requires_grad_()
    combined = reference.combine_experts(y, gates)
    torch.testing.assert_close(combined.flatten(), torch.tensor([1e4]) + torch.tensor(0.25).log())
    combined.sum().backward()
    assert y.grad is not None
    assert gates.grad is not None
    assert y.grad.flatten().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert gates.grad.isfinite().all()


def test_token_without_experts_gets_log_epsilon_and_no_gradient() -> None:
    y = torch.randn(1, 1, 4, 3, requires_grad=True)
    gates = torch.zeros(1, 1, 4, requires_grad=True)
    combined = reference.combine_experts(y, gates)
    expected = torch.tensor(2.220446049250313e-16).log()
    torch.testing.assert_close(combined, expected.expand(1, 1, 3))
    combined.sum().backward()
    assert y.grad is not None
    assert not y.grad.any()


def test_agrees_with_the_plain_sum_of_exponentials() -> None:
    y = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    gates, _ = reference.noisy_topk_gating(torch.randn(2, 5, 4).double(), None, None, 2)
    plain = (gates.unsqueeze(-1) * y.exp()).sum(-2).log()
    torch.testing.assert_close(reference.combine_experts(y, gates), plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_token_stays_non_finite_and_alone(value: float) -> None:
    x = torch.randn(4, 64)
    x[1, 3] = value
    out = layer().eval()(x)
    assert not out[1].isfinite().any()
    assert out[[0, 2, 3]].isfinite().all()


def test_fresh_layer_ties_and_takes_the_first_experts() -> None:
    torch.manual_seed(0)
    made = AoMoALinear(nn.Linear(64, 48)).eval()
    _, gates, load = made.forward_with_routing(torch.randn(2, 9, 64))
    assert torch.equal(gates, torch.tensor([0.5, 0.5, 0, 0]).expand(2, 18, 4))
    assert torch.equal(load, torch.tensor([18.0, 18, 0, 0]).expand(2, 4))


def test_answers_for_the_frozen_layer() -> None:
    made = layer()
    assert made.weight is made.linear.weight
    assert made.bias is made.linear.bias
    assert (made.in_features, made.out_features) == (64, 48)
    assert "weight" not in made.state_dict()


def test_noise_is_drawn_in_training_only() -> None:
    made = layer()
    x = torch.randn(3, 64)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def test_frozen_layer_gets_no_gradient_and_adapter_all() -> None:
    made = layer()
    made(torch.randn(50, 64)).square().sum().backward()
    for name, parameter in made.named_parameters():
        if name.startswith("linear."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_balance_loss_sees_an_unused_expert() -> None:
    gates = torch.zeros(1, 8, 4)
    gates[..., 0] = 1
    uneven = balance_loss(gates, gates.sum(1))
    even = balance_loss(torch.full((1, 8, 4), 0.25), torch.full((1, 4), 2.0))
    torch.testing.assert_close(uneven, torch.tensor(8.0))  # cv² is 4 for each of the two terms
    assert even == 0
    made = layer()
    _, gates, load = made.forward_with_routing(torch.randn(20, 64))
    balance_loss(gates, load).backward()
    assert made.gate.grad is not None
    assert made.gate.grad.any()
    assert made.gate_noise.grad is not None
    assert made.gate_noise.grad.any()


def test_autocast_casts_forward_and_backward() -> None:
    made = layer()
    x = torch.randn(6, 64, requires_grad=True)
    noise = torch.randn(2, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x, noise)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    exact = made(x.detach(), noise)
    assert ladder.relative_error(out.detach(), exact.detach()) < 0.1


def test_copies_pickles_and_reloads() -> None:
    made = layer().eval()
    x = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), made(x))
    other = AoMoALinear(nn.Linear(64, 48)).eval()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))


def test_published_names_load_and_are_listed() -> None:
    made = layer()
    state = made.state_dict()
    listed = official_parameters(made)
    assert listed["blocks_MoA.MoA.experts.3.fc2.weight"] == ("fc2_weight", 3)
    published = {name: where.of(state[where.name]) for name, where in listed.items()}
    other = AoMoALinear(nn.Linear(64, 48))
    other.load_state_dict(published)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attributes": 5}, "attributes: got 5, expected a divisor"),
        ({"top_k": 5}, "top_k: got 5, expected 1 to 4"),
        ({"rank": 0}, "rank: got 0"),
    ],
)
def test_bad_module_options_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AoMoALinear(nn.Linear(64, 48), **options)


def test_bad_arguments_are_named() -> None:
    # fmt: off
    names = [
        "x", "weight", "bias", "scaler", "norm1_weight", "norm1_bias", "down", "norm2_weight",
        "norm2_bias", "gate", "gate_noise", "noise", "fc1_weight", "fc1_bias", "fc2_weight",
        "fc2_bias", "up", "top_k", "norm_eps",
    ]
    # fmt: on
    good = dict(zip(names, arguments(), strict=True))
    aomoa(**good)
    for name in names[3:-2]:
        with pytest.raises((ValueError, TypeError), match=rf"{name}: got shape"):
            aomoa(**{**good, name: torch.zeros(1, 1, 1, 77, dtype=torch.float64)})
    with pytest.raises(TypeError, match=r"x: got dtype torch.int64"):
        aomoa(**{**good, "x": good["x"].long()})
    for name in (*names[1:11], *names[12:-2]):
        for wrong, found in ((torch.float32, "dtype torch.float32"), ("meta", "device meta")):
            with pytest.raises((ValueError, TypeError), match=rf"{name}: got {found}"):
                aomoa(**{**good, name: good[name].to(wrong)})
    aomoa(**{**good, "noise": good["noise"].float()})
    with pytest.raises(TypeError, match=r"noise: got dtype torch.bfloat16"):
        aomoa(**{**good, "noise": good["noise"].bfloat16()})
    with pytest.raises(ValueError, match="top_k: got 9"):
        aomoa(**{**good, "top_k": 9})
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        aomoa(**good, backend="fast")
