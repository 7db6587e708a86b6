"""HyperT's attention on a GPU: the proof ladder at odd and at the paper's sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectralx_kernels.hypert.attention import ATTRIBUTE_MATCH, WINDOW_ATTENTION
from tests.gpu.watching import no_synchronisation
from tests.kernels import ladder
from tests.kernels.hypert.test_attention import MATCHES, WINDOWS, match_args, window_args
from tests.kernels.hypert.test_ops import draw

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# map, heads, width of a head, window: spatial and spectral attention of the paper
PAPER = {"spatial": ((28, 28), 4, 64, (7, 7)), "spectral": ((1, 512), 4, 98, (1, 512))}


def paper_args(name: str) -> list[Any]:
    side, heads, dim, window = PAPER[name]
    channels = 3 * heads * dim
    return [draw(1, *side, channels), draw(channels, seed=1), heads, list(window)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WINDOWS)
def test_window_attention(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(WINDOW_ATTENTION, window_args(name), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PAPER)
def test_window_attention_at_the_papers_sizes(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(WINDOW_ATTENTION, paper_args(name), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MATCHES)
def test_attribute_match(name: str, dtype: torch.dtype) -> None:
    ladder.check_accuracy(ATTRIBUTE_MATCH, match_args(name), dtype, "cuda")


def test_repeats_without_synchronising() -> None:
    for operator, args in (
        (WINDOW_ATTENTION, paper_args("spatial")),
        (ATTRIBUTE_MATCH, match_args("several tiles", batch=3)),
    ):
        ladder.check_repeats(operator, args, "cuda")
        there = ladder.cast(ladder.moved(args, "cuda"), torch.float32)
        operator(*there)
        with no_synchronisation():
            operator(*there)
