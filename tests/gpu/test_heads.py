"""Stage 1's prediction heads on a GPU: the proof ladder at small and at real widths."""

from __future__ import annotations

import pytest
import torch

from spectralx_kernels.reconstruction.heads import (
    CHANNEL_NORM,
    CHANNEL_NORM_CONV2D,
    GELU_GROUPED_CONV2D,
    PIXEL_HEAD,
)
from tests.kernels import ladder
from tests.kernels.reconstruction.test_grouped_convolution import arguments as grouped_arguments
from tests.kernels.reconstruction.test_heads import (
    ACTIVATIONS,
    conv_arguments,
    head_arguments,
    norm_arguments,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("before", "after"), ACTIVATIONS)
def test_norms(before: str, after: str, dtype: torch.dtype) -> None:
    # What channels change is the same in both half types; each width is another kernel to compile.
    for channels in (3, 52, 512) if dtype != torch.float16 else (52,):
        args = norm_arguments((2, channels, 9, 31), before, after)
        ladder.check_accuracy(CHANNEL_NORM, args, dtype, "cuda")
        for transposed in (True, False):
            args = conv_arguments(before, after, transposed=transposed, channels=channels)
            ladder.check_accuracy(CHANNEL_NORM_CONV2D, args, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels(dtype: torch.dtype) -> None:
    for args in (
        head_arguments(),
        head_arguments((5, 3), ins=64, wide=70, mixed=33, up=4),
        head_arguments((9, 7), batch=1, ins=128, wide=256, mixed=256, bands=13, up=4),
    ):
        ladder.check_accuracy(PIXEL_HEAD, args, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_convolutions(dtype: torch.dtype) -> None:
    for args in (
        grouped_arguments(),
        grouped_arguments(35, (5, 33)),
        grouped_arguments(256, (28, 28), batch=1),
    ):
        ladder.check_accuracy(GELU_GROUPED_CONV2D, args, dtype, "cuda")


def test_same_bits() -> None:
    ladder.check_repeats(GELU_GROUPED_CONV2D, grouped_arguments(64, (28, 28)), "cuda")
    ladder.check_repeats(CHANNEL_NORM, norm_arguments((2, 52, 40, 40), "gelu", "gelu"), "cuda")
    ladder.check_repeats(PIXEL_HEAD, head_arguments((9, 7), ins=64, wide=64, mixed=64), "cuda")
