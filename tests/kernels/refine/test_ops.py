"""The operators of the Are-adapter: contract, gradients, accuracy, and what they compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralx_kernels import _backends
from spectralx_kernels.refine import (
    add_weighted_halves,
    gather_norm,
    gather_norm_mix,
    match_argmax,
    ops,
)
from tests.kernels import ladder
from tests.kernels.refine.cases import draw

MATCH = torch.tensor([[3, 0, 0, 2, 3, 3], [1, 1, 1, 1, 1, 1]])
NORM: list[Any] = [1 + 0.1 * draw(5), 0.1 * draw(5, seed=1)]
GATHER: list[Any] = [draw(2, 4, 5), MATCH, *NORM, 1e-5]
MIX: list[Any] = [draw(2, 4, 5), MATCH, *NORM, draw(3, 6), 1e-5]
ADD: list[Any] = [draw(2, 4, 6), draw(2, 4), draw(2, 4, seed=1), draw()]
SCORES: list[Any] = [draw(2, 4, 5), draw(2, 6, 5), 0.5]

DIFFERENTIABLE = [
    pytest.param(ops.GATHER_NORM, GATHER, id="gather_norm"),
    pytest.param(ops.GATHER_NORM_MIX, MIX, id="gather_norm_mix"),
    pytest.param(ops.ADD_WEIGHTED, ADD, id="add_weighted_halves"),
]
CASES = [pytest.param(ops.MATCH, SCORES, id="match_argmax"), *DIFFERENTIABLE]


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_contract(operator, args):
    ladder.check_contract(operator, args)


@pytest.mark.parametrize(("operator", "args"), DIFFERENTIABLE)
def test_gradients(operator, args):
    ladder.check_gradients(operator, args)


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_compiles(operator, args):
    ladder.check_compiles(operator.op, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operator", "args"), CASES)
def test_accuracy(operator, args, dtype):
    ladder.check_accuracy(operator, args, dtype)


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_repeats(operator, args):
    ladder.check_repeats(operator, args)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    queries=st.integers(1, 9),
    keys=st.integers(0, 9),
    width=st.integers(1, 5),
)
def test_match_is_the_argmax_of_the_softmax(batch, queries, keys, width):
    q, k = draw(batch, queries, width), draw(batch, keys, width, seed=1)
    match = match_argmax(q, k)
    attention = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width), dim=2)
    assert match.dtype == torch.int64
    assert torch.equal(match, attention.argmax(dim=1))


def test_match_differs_from_the_nearest_query():
    """A query that is large for every key is not the best one for all of them."""
    q = torch.tensor([[[10.0, 10.0], [1.0, 0.0]]])
    k = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.6]]])
    assert (q @ k.transpose(1, 2)).argmax(dim=1).tolist() == [[0, 0, 0]]
    assert match_argmax(q, k).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_match_ties_go_to_the_lowest_index(dtype):
    k = draw(2, 7, 4).to(dtype)
    same = draw(2, 1, 4, seed=1).to(dtype).expand(2, 5, 4)
    assert torch.equal(match_argmax(same, k), torch.zeros(2, 7, dtype=torch.int64))
    twice = draw(2, 6, 4, seed=2).to(dtype)
    twice[:, 3:] = twice[:, :3]
    assert (match_argmax(twice, k) < 3).all()


def test_for_an_only_key_all_queries_tie():
    q, k = draw(3, 37, 5).float(), draw(3, 1, 5, seed=1).float()
    for name in _backends.available("match_argmax", "cpu", torch.float32):
        assert not match_argmax(q, k, backend=name).any(), name


def test_match_of_nan_and_of_one_query():
    q, k = draw(1, 4, 3), draw(1, 5, 3)
    assert match_argmax(q[:, :1], k).tolist() == [[0] * 5]
    q[0, 2, 1] = torch.nan
    assert match_argmax(q, k).tolist() == [[2] * 5]
    q, k = draw(1, 4, 3), draw(1, 5, 3)
    k[0, 3, 0] = torch.nan
    assert match_argmax(q, k).tolist() == [[0] * 5]


def test_match_takes_a_scale_and_large_scores():
    q, k = 100 * draw(1, 8, 4), 100 * draw(1, 9, 4, seed=1)
    exact = match_argmax(q, k, scale=0.25)
    assert torch.equal(match_argmax(q.float(), k.float(), scale=0.25), exact)
    assert torch.equal(match_argmax(q / 4, k, scale=1.0), exact)
    assert not torch.equal(match_argmax(q, k, scale=1e-5), exact)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    tokens=st.integers(1, 6),
    keys=st.integers(0, 7),
    width=st.integers(1, 5),
    mixed=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_gathers_are_their_definition(batch, tokens, keys, width, mixed, seed):
    generator = torch.Generator().manual_seed(seed)
    x = draw(batch, tokens, 2 * width)[..., :width]  # a strided half
    match = torch.randint(tokens, (batch, keys), generator=generator)
    weight, bias, mixing = draw(width), draw(width, seed=1), draw(mixed, keys)
    found = gather_norm(x, match, weight, bias)
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    rows = [normed[image, index] for image in range(batch) for index in match[image].tolist()]
    expected = torch.stack(rows) if rows else normed.new_zeros(0, width)
    expected = expected.view(batch, keys, width)
    torch.testing.assert_close(found, expected)
    mix = gather_norm_mix(x, match, weight, bias, mixing)
    torch.testing.assert_close(mix, torch.einsum("tk,bkh->bth", mixing, expected))
    for image in range(batch):  # the same with the gather folded into the weight
        folded = torch.zeros(mixed, tokens, dtype=x.dtype).index_add(1, match[image], mixing)
        torch.testing.assert_close(mix[image], folded @ normed[image])


def test_small_index_dtypes():
    for dtype in (torch.int16, torch.int32, torch.uint8):
        assert torch.equal(
            gather_norm(GATHER[0], MATCH.to(dtype), *NORM), gather_norm(GATHER[0], MATCH, *NORM)
        )


def test_add_weighted_halves_is_its_definition():
    tokens, spatial, spectral, scale = ADD
    found = add_weighted_halves(*ADD)
    torch.testing.assert_close(found[..., :3], tokens[..., :3] * (1 + scale * spatial[..., None]))
    torch.testing.assert_close(found[..., 3:], tokens[..., 3:] * (1 + scale * spectral[..., None]))


def test_autocast_keeps_the_residual_stream_in_float32():
    leaves = ladder.cast(ADD, torch.float32, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refined = add_weighted_halves(leaves[0], leaves[1].bfloat16(), *leaves[2:])
    assert refined.dtype == torch.float32
    torch.testing.assert_close(refined, add_weighted_halves(*leaves), atol=2e-2, rtol=0)
    refined.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_nan_stays_with_the_keys_of_its_token():
    tokens = GATHER[0].clone()
    tokens[0, 3, 1] = torch.nan
    gathered = gather_norm(tokens, MATCH, *NORM)
    assert torch.equal(gathered.isnan().all(dim=2), (MATCH == 3) & (torch.arange(2) == 0)[:, None])
    mixed = gather_norm_mix(tokens, *MIX[1:5])
    assert mixed[0].isnan().all()
    assert mixed[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": torch.zeros(2, 4)}, ValueError, "queries: got shape"),
        ({"queries": torch.zeros(2, 0, 5)}, ValueError, "rows of queries: got 0"),
        ({"queries": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, "queries: got dtype"),
        ({"keys": torch.zeros(2, 6, 4)}, ValueError, "keys: got shape"),
        ({"keys": torch.zeros(2, 6, 5).double()}, TypeError, "keys: got dtype"),
        ({"keys": torch.zeros(1, 6, 5)}, ValueError, "keys: got shape"),
    ],
)
def test_match_argmax_rejects(change, error, message):
    options: dict[str, Any] = {"queries": torch.zeros(2, 4, 5), "keys": torch.zeros(2, 6, 5)}
    with pytest.raises(error, match=message):
        match_argmax(**(options | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.zeros(4, 5)}, ValueError, "tokens: got shape"),
        ({"match": MATCH[:1]}, ValueError, "match: got shape"),
        ({"match": MATCH.float()}, TypeError, "match: got dtype"),
        ({"match": MATCH + 1}, ValueError, "match: got 4, expected 0 to 3"),
        ({"match": MATCH - 1}, ValueError, "match: got -1, expected 0 to 3"),
        ({"norm_weight": torch.zeros(4)}, ValueError, "norm_weight: got shape"),
        ({"norm_bias": torch.zeros(5).double()}, TypeError, "norm_bias: got dtype"),
        ({"mixing": torch.zeros(3, 5)}, ValueError, "mixing: got shape"),
        ({"mixing": torch.zeros(3, 6).double()}, TypeError, "mixing: got dtype"),
    ],
)
def test_gathers_reject(change, error, message):
    options: dict[str, Any] = {
        "tokens": torch.zeros(2, 4, 5),
        "match": MATCH,
        "norm_weight": torch.zeros(5),
        "norm_bias": torch.zeros(5),
    }
    mixing = {"mixing": torch.zeros(3, 6)}
    with pytest.raises(error, match=message):
        gather_norm_mix(**(options | mixing | change))
    if "mixing" not in change:
        with pytest.raises(error, match=message):
            gather_norm(**(options | change))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 4, 5), "tokens: got width 5"),
        (0, torch.zeros(4, 6), "tokens: got shape"),
        (1, torch.zeros(2, 5), "spatial_weight: got shape"),
        (2, torch.zeros(2, 4, 1), "spectral_weight: got shape"),
        (3, torch.zeros(1), "scale: got shape"),
    ],
)
def test_add_weighted_halves_rejects(position, value, message):
    args = ladder.cast(ADD, torch.float32)
    args[position] = value
    with pytest.raises(ValueError, match=message):
        add_weighted_halves(*args)
