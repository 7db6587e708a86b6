"""The operators of HyperT: contract, gradients, accuracy, and what they compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels.hypert import attention, attribute_match, window_attention
from tests.kernels import ladder


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def window_args(padded: bool = True) -> list[Any]:
    height, width = (5, 3) if padded else (4, 2)
    return [draw(2, height, width, 12), draw(12) if padded else None, 2, [2, 2]]


def match_args() -> list[Any]:
    return [draw(2, 7, 5), draw(3, 2), 1 + 0.1 * draw(5), 0.1 * draw(5), draw(4, 5), 1e-5]


CASES = [
    pytest.param(attention.WINDOW_ATTENTION, window_args(), id="window_attention-padded"),
    pytest.param(attention.WINDOW_ATTENTION, window_args(padded=False), id="window_attention"),
    pytest.param(attention.ATTRIBUTE_MATCH, match_args(), id="attribute_match"),
]


@pytest.mark.parametrize(("operator", "args"), [CASES[0], CASES[2]])
def test_contract(operator, args):
    ladder.check_contract(operator, args)


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_gradients(operator, args):
    ladder.check_gradients(operator, args)


@pytest.mark.parametrize(("operator", "args"), [CASES[1], CASES[2]])
def test_compiles(operator, args):
    ladder.check_compiles(operator.op, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operator", "args"), CASES)
def test_accuracy(operator, args, dtype):
    ladder.check_accuracy(operator, args, dtype)


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_repeats(operator, args):
    ladder.check_repeats(operator, args)


def attention_by_position(
    qkv: Tensor, padding: Tensor, num_heads: int, window: tuple[int, int]
) -> Tensor:
    """One position at a time, straight from the definition. qkv [H, W, 3D]."""
    height, width, channels = qkv.shape
    dim = channels // 3 // num_heads
    out = torch.empty(height, width, channels // 3, dtype=qkv.dtype)
    for row in range(height):
        for column in range(width):
            top, left = row // window[0] * window[0], column // window[1] * window[1]
            keys = [
                qkv[r, c] if r < height and c < width else padding
                for r in range(top, top + window[0])
                for c in range(left, left + window[1])
            ]
            for head in range(num_heads):
                at = [slice(part + head * dim, part + (head + 1) * dim) for part in
                      (0, channels // 3, 2 * channels // 3)]  # fmt: skip
                scores = torch.stack([qkv[row, column, at[0]] @ key[at[1]] for key in keys])
                weights = torch.softmax(scores / math.sqrt(dim), dim=0)
                values = torch.stack([key[at[2]] for key in keys])
                out[row, column, head * dim : (head + 1) * dim] = weights @ values
    return out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    num_heads=st.integers(1, 3),
    dim=st.integers(1, 3),
)
def test_window_attention_is_its_definition(height, width, rows, columns, num_heads, dim):
    channels = 3 * num_heads * dim
    qkv, padding = draw(2, height, width, channels), draw(channels, seed=1)
    found = window_attention(qkv, padding, num_heads=num_heads, window=(rows, columns))
    for image in range(2):
        expected = attention_by_position(qkv[image], padding, num_heads, (rows, columns))
        torch.testing.assert_close(found[image], expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(count=st.integers(1, 9), width=st.integers(1, 6), queries=st.integers(1, 4))
def test_attribute_match_is_its_definition(count, width, queries):
    inner = max(width // 2, 1)
    features, query = draw(2, count, width), draw(queries, inner)
    weight, bias, kv = draw(width), draw(width, seed=1), draw(2 * inner, width)
    centred = features - features.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    k, v = normed @ kv[:inner].T, normed @ kv[inner:].T
    scores = torch.einsum("md,bnd->bmn", query, k) / math.sqrt(inner)
    expected = torch.softmax(scores, dim=-1) @ v
    torch.testing.assert_close(attribute_match(features, query, weight, bias, kv), expected)


def test_padding_matters_only_where_windows_do_not_divide():
    qkv, zeros, ones = draw(1, 3, 3, 6), torch.zeros(6).double(), torch.ones(6).double()
    options: dict[str, Any] = {"num_heads": 1, "window": (2, 2)}
    padded = [window_attention(qkv, padding, **options) for padding in (zeros, ones)]
    assert not torch.allclose(padded[0], padded[1])
    options["window"] = (3, 3)
    whole = [window_attention(qkv, padding, **options) for padding in (zeros, ones, None)]
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], whole[2])


def test_no_images():
    assert window_attention(draw(0, 3, 3, 6), draw(6), num_heads=1, window=(2, 2)).shape == (
        0, 3, 3, 2,
    )  # fmt: skip
    args = match_args()
    assert attribute_match(args[0][:0], *args[1:5]).shape == (0, 3, 2)


def test_strided_inputs():
    qkv = draw(2, 12, 5, 4).permute(0, 2, 3, 1)
    options: dict[str, Any] = {"num_heads": 2, "window": (2, 3)}
    torch.testing.assert_close(
        window_attention(qkv, draw(12), **options),
        window_attention(qkv.contiguous(), draw(12), **options),
    )


def test_nan_reaches_every_output_that_depends_on_it():
    qkv = draw(1, 4, 4, 6).float()
    qkv[0, 0, 0, 2] = torch.nan  # a key
    out = window_attention(qkv, num_heads=1, window=(2, 2))
    assert out[0, :2, :2].isnan().all()
    assert out[0, 2:].isfinite().all()
    args = [arg.float() if isinstance(arg, Tensor) else arg for arg in match_args()[:5]]
    args[0][1, 3, 0] = torch.nan
    matched = attribute_match(*args)
    assert matched[1].isnan().all()
    assert matched[0].isfinite().all()


def test_autocast_casts_once_and_keeps_gradients():
    leaves = ladder.cast(window_args()[:2], torch.float32, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(*leaves, num_heads=2, window=(2, 2))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(1, 2, 2, 6, dtype=torch.int64)}, TypeError, "qkv: got dtype"),
        ({"qkv": torch.zeros(2, 2, 6)}, ValueError, "qkv: got shape"),
        ({"qkv": torch.zeros(1, 2, 2, 7)}, ValueError, "qkv: got 7 channels"),
        ({"num_heads": 4}, ValueError, "num_heads: got 4, expected a divisor of the 2"),
        ({"window": (0, 2)}, ValueError, "window: got"),
        ({"window": (3, 2)}, ValueError, "padding: got None"),
        ({"padding": torch.zeros(5)}, ValueError, "padding: got shape"),
        ({"padding": torch.zeros(6).double()}, TypeError, "padding: got dtype"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
    ],
)
def test_window_attention_rejects(change, error, message):
    options: dict[str, Any] = {"qkv": torch.zeros(1, 2, 2, 6), "num_heads": 1, "window": (2, 2)}
    with pytest.raises(error, match=message):
        window_attention(**(options | change))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(7, 5), ValueError, "features: got shape"),
        (0, torch.zeros(2, 0, 5), ValueError, "positions of features: got 0"),
        (1, torch.zeros(1, 3, 2), ValueError, "queries: got shape"),
        (1, torch.zeros(3, 2).double(), TypeError, "queries: got dtype"),
        (2, torch.zeros(4), ValueError, "norm_weight: got shape"),
        (3, torch.zeros(4), ValueError, "norm_bias: got shape"),
        (4, torch.zeros(2, 5), ValueError, r"kv_weight: got shape \[2, 5\], expected \[4, 5\]"),
    ],
)
def test_attribute_match_rejects(position, value, error, message):
    args = ladder.cast(match_args()[:5], torch.float32)
    args[position] = value
    with pytest.raises(error, match=message):
        attribute_match(*args)
