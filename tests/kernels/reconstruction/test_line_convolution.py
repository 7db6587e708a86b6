"""Convolutions of maps so wide that the C++ kernels take them a line at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spectralx_kernels.reconstruction.heads import CHANNEL_NORM_CONV2D
from tests.kernels import ladder
from tests.kernels.reconstruction.test_heads import draw

# Kernel, stride, padding, transposed: the heads', no padding, more padding than the kernel covers,
# strides that divide the kernel, do not, and exceed it.
KINDS = [
    ((3, 3), (1, 1), (1, 1), False),
    ((4, 1), (1, 1), (0, 0), False),
    ((1, 3), (1, 1), (2, 4), False),
    ((4, 4), (2, 2), (1, 1), True),
    ((2, 2), (2, 2), (0, 0), True),
    ((3, 2), (2, 3), (1, 0), True),
    ((3, 3), (1, 1), (2, 2), True),
]


def arguments(
    kind: Any = KINDS[0], *, norm: bool = True, ins: int = 5, outs: int = 3, batch: int = 2,
    height: int = 4, width: int = 35, after: str = "leaky_relu",
) -> tuple[Any, ...]:  # fmt: skip
    kernel, stride, padding, transposed = kind
    x = draw(batch, ins, height, width) + 0.3
    vectors = (draw(ins, seed=2), draw(ins, seed=3)) if norm else (None, None)
    weight = draw(*((ins, outs) if transposed else (outs, ins)), *kernel, seed=4) / 6
    return (x, *vectors, 1e-6, "none", after, weight, draw(outs, seed=5) if norm else None,
            transposed, list(stride), list(padding))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_wide_lines_agree(kind: Any) -> None:
    wide = arguments(kind, norm=False, after="relu", ins=17, outs=18, batch=1)
    for args in (arguments(kind), wide):
        ladder.check_accuracy(CHANNEL_NORM_CONV2D, args, torch.float32)


def test_many_lines_agree_whatever_the_threads() -> None:
    """Runs of lines that cross images; the same bits from any number of threads."""
    args = ladder.cast(arguments(height=45), torch.float32)
    exact = ladder.run_with_gradients(
        CHANNEL_NORM_CONV2D.reference, ladder.cast(args, torch.float64, grad=True)
    )
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = ladder.cast(args, torch.float32, grad=True)
            found.append(
                ladder.run_with_gradients(lambda *v: CHANNEL_NORM_CONV2D(*v, backend="cpp"), leaves)
            )
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[0][0][0].double(), exact[0][0], rtol=1e-5, atol=1e-5)
    for name, grad in exact[1].items():
        torch.testing.assert_close(found[0][1][name].double(), grad, rtol=1e-4, atol=1e-4)
    for other in found[1:]:
        assert torch.equal(found[0][0][0], other[0][0])
        assert all(torch.equal(found[0][1][name], grad) for name, grad in other[1].items())


@pytest.mark.parametrize("constants", [[0], [1, 2], [6, 7], [0, 1, 2], [0, 6], [0, 1, 2, 6]])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]])
def test_only_what_is_wanted_of_wide_lines(kind: Any, constants: list[int]) -> None:
    args = arguments(kind)
    every, some = (
        ladder.run_with_gradients(
            lambda *v: CHANNEL_NORM_CONV2D(*v, backend="cpp"),
            ladder.cast(args, torch.float32, grad=True, constants=left_out),
        )[1]
        for left_out in ([], constants)
    )
    assert some.keys() == {f"argument {i}" for i in (0, 1, 2, 6, 7) if i not in constants}
    assert all(torch.equal(grad, every[name]) for name, grad in some.items())


def test_half_types_and_other_layouts_of_wide_lines() -> None:
    """float16 is convolved in float, bfloat16 and float64 by the vendor; strides are any."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        ladder.check_accuracy(CHANNEL_NORM_CONV2D, arguments(batch=1), dtype)
    x, *rest = ladder.cast(arguments(), torch.float32)
    strided = x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert torch.equal(*(CHANNEL_NORM_CONV2D(each, *rest, backend="cpp") for each in (x, strided)))
