"""upsample_argmax: exact classes, ties, probabilities, edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._operator import Operator
from spectralx_kernels.upsample import upsample_argmax
from spectralx_kernels.upsample.prediction import (
    UPSAMPLE_ARGMAX,
    UPSAMPLE_ARGMAX_PROBABILITY,
)
from tests.kernels import ladder


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("operator", [UPSAMPLE_ARGMAX, UPSAMPLE_ARGMAX_PROBABILITY])
def test_ladder(operator: Operator) -> None:
    args = (draw(2, 5, 3, 2), [7, 5], False)
    ladder.check_contract(operator, args)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ladder.check_accuracy(operator, args, dtype)
    ladder.check_repeats(operator, args)


def test_gradient_of_the_probability() -> None:
    ladder.check_gradients(UPSAMPLE_ARGMAX_PROBABILITY, (draw(1, 3, 2, 2), [3, 4], False))


def test_compiles() -> None:
    for probability in (False, True):
        ladder.check_compiles(
            lambda logits, probability=probability: upsample_argmax(
                logits, (6, 7), return_probability=probability
            ),
            (draw(2, 4, 3, 3),),
            compiler="aot_eager",
        )


@given(
    batch=st.integers(0, 2),
    classes=st.integers(1, 6),
    small=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    align_corners=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_the_two_calls(
    batch: int,
    classes: int,
    small: tuple[int, int],
    size: tuple[int, int],
    align_corners: bool,
) -> None:
    logits = draw(batch, classes, *small)
    upsampled = F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)
    top, expected = upsampled.softmax(dim=1).max(dim=1)
    assert torch.equal(upsample_argmax(logits, size, align_corners=align_corners), expected)
    label, probability = upsample_argmax(
        logits, size, align_corners=align_corners, return_probability=True
    )
    assert torch.equal(label, expected)
    torch.testing.assert_close(probability, top)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_the_lowest_class(dtype: torch.dtype, backend: str) -> None:
    if backend not in _backends.available(UPSAMPLE_ARGMAX.name, "cpu", dtype):
        pytest.skip(f"{backend} does not take {dtype} here")
    logits = torch.zeros(2, 19, 14, 14, dtype=dtype)
    logits[:, 3] = logits[:, 17] = 1
    label, probability = upsample_argmax(logits, 56, return_probability=True, backend=backend)
    assert torch.equal(label, upsample_argmax(logits, 56, backend=backend))
    assert (label == 3).all()
    assert probability.dtype == dtype
    assert (upsample_argmax(torch.zeros_like(logits), 56, backend=backend) == 0).all()


def test_nan_is_seen(backend: str) -> None:
    logits = draw(1, 4, 2, 2).to(ladder.widest(UPSAMPLE_ARGMAX, backend))
    logits[0, 2, 0, 0] = torch.nan
    label, probability = upsample_argmax(logits, 8, return_probability=True, backend=backend)
    hit = F.interpolate(logits, size=8, mode="bilinear", align_corners=False).isnan().any(dim=1)
    assert hit.any()
    assert torch.equal(probability.isnan(), hit)
    assert (label[hit] == 2).all()


def test_float32_under_autocast() -> None:
    logits = draw(1, 4, 2, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        label, probability = upsample_argmax(logits, 8, return_probability=True)
    assert probability.dtype == torch.float32
    plain = upsample_argmax(logits, 8)
    assert torch.equal(label, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 4, 4)}, r"logits: got shape \[3, 4, 4\]"),
        ({"logits": torch.zeros(2, 3, 4, 4).int()}, "logits: got dtype torch.int32"),
        ({"size": (0, 8)}, r"size: got \(0, 8\), expected two integers of at least 1"),
    ],
)
def test_bad_logits_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"logits": torch.zeros(2, 3, 4, 4), "size": 8}
    with pytest.raises((TypeError, ValueError), match=message):
        upsample_argmax(**{**good, **change})
