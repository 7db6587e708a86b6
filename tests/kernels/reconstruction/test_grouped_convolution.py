"""GELU, a grouped 3x3 convolution and GELU in one operator: the proof ladder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectralx_kernels import _backends, gelu_grouped_conv2d
from spectralx_kernels.reconstruction.heads import GELU_GROUPED_CONV2D
from tests.kernels import ladder
from tests.kernels.reconstruction.test_heads import DTYPES, draw


def arguments(
    half: int = 3, size: tuple[int, int] = (4, 3), *, batch: int = 2
) -> tuple[Tensor, ...]:
    x, weight = draw(batch, 2 * half, *size), draw(half, 2, 3, 3, seed=1) / 3
    return x, weight, draw(half, seed=2)


def test_ladder() -> None:
    args = arguments(2, (2, 3), batch=1)
    ladder.check_contract(GELU_GROUPED_CONV2D, args)
    ladder.check_gradients(GELU_GROUPED_CONV2D, args)
    ladder.check_repeats(GELU_GROUPED_CONV2D, arguments())
    ladder.check_compiles(GELU_GROUPED_CONV2D, args, compiler="aot_eager")


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees(dtype: torch.dtype) -> None:
    """Channels that fill vectors one by one and four by four, and those that are left over."""
    for half, size in ((1, (1, 1)), (3, (1, 5)), (19, (5, 1)), (86, (3, 4))):
        ladder.check_accuracy(GELU_GROUPED_CONV2D, arguments(half, size), dtype)


@settings(max_examples=15, deadline=None)
@given(
    half=st.integers(1, 20), size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(0, 2),
)  # fmt: skip
def test_any_size(half: int, size: tuple[int, int], batch: int) -> None:
    args = arguments(half, size, batch=batch)
    results = [
        ladder.run_with_gradients(run, ladder.cast(args, torch.float64, grad=True))
        for run in (GELU_GROUPED_CONV2D, GELU_GROUPED_CONV2D.reference)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wide", [20000, 60000])
def test_a_map_of_many_strips(wide: int) -> None:
    """Lines so long that a strip has three of them, or one."""
    args = arguments(4, (5, wide), batch=1)
    results = [
        ladder.run_with_gradients(run, ladder.cast(args, torch.float64, grad=True))
        for run in (GELU_GROUPED_CONV2D, GELU_GROUPED_CONV2D.reference)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("frozen", [[0], [1, 2], [0, 2], [0, 1]])
def test_only_what_is_wanted(frozen: list[int]) -> None:
    """Gradients of some arguments are those of all."""
    args = arguments()
    every = ladder.cast(args, torch.float64, grad=True)
    some = ladder.cast(args, torch.float64, grad=True, constants=frozen)
    whole, part = (
        ladder.run_with_gradients(GELU_GROUPED_CONV2D, each)[1] for each in (every, some)
    )
    assert part.keys() == {f"argument {i}" for i in range(3) if i not in frozen}
    for name, grad in part.items():
        torch.testing.assert_close(grad, whole[name])


def test_like_modules_one_after_another() -> None:
    convolution = nn.Conv2d(6, 3, 3, padding=1, groups=3)
    pair = convolution.weight, convolution.bias
    for layout in (torch.contiguous_format, torch.channels_last):
        x = draw(2, 6, 5, 3).float().contiguous(memory_format=layout).requires_grad_()
        out = gelu_grouped_conv2d(x, pair)  # type: ignore[arg-type]
        torch.testing.assert_close(out, F.gelu(convolution(F.gelu(x))))
        assert out.is_contiguous(memory_format=torch.channels_last)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.stride() == x.stride()


def test_gradients_in_either_layout() -> None:
    """Of one image a planar gradient can be seen as rows of pixels without a copy."""
    args = ladder.cast(arguments(batch=1), torch.float32, grad=True)
    grad = draw(1, 3, 4, 3, seed=3).float()
    expected = torch.autograd.grad(GELU_GROUPED_CONV2D.reference(*args), args, grad)
    for backend in _backends.available(GELU_GROUPED_CONV2D.name, "cpu"):
        for layout in (torch.contiguous_format, torch.channels_last):
            out = GELU_GROUPED_CONV2D(*args, backend=backend)
            found = torch.autograd.grad(out, args, grad.contiguous(memory_format=layout))
            torch.testing.assert_close(found, expected)


def test_nothing_is_kept_but_x() -> None:
    args = ladder.cast(arguments(5, (30, 40)), torch.float32, grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        GELU_GROUPED_CONV2D(*args)
    known = {arg.data_ptr() for arg in args}
    assert all(tensor.data_ptr() in known for tensor in kept)


def test_nan() -> None:
    """What is not a number reaches the pixels around it, and no others."""
    args: list[Any] = list(ladder.cast(arguments(3, (6, 7), batch=1), torch.float32))
    args[0][0, 2, 1, 1] = torch.nan
    out = GELU_GROUPED_CONV2D(*args)
    wrong = torch.zeros_like(out, dtype=torch.bool)
    wrong[0, 1, :3, :3] = True
    assert torch.equal(out.isnan(), wrong)


def test_checked() -> None:
    x, weight, bias = ladder.cast(arguments(), torch.float32)
    with pytest.raises(ValueError, match=r"weight of grouped: got shape \[3, 2, 3, 2\]"):
        gelu_grouped_conv2d(x, (weight[..., :2], bias))
    with pytest.raises(ValueError, match=r"bias of grouped: got shape \[2\]"):
        gelu_grouped_conv2d(x, (weight, bias[:2]))
    with pytest.raises(ValueError, match=r"x: got shape \[2, 5, 4, 3\]"):
        gelu_grouped_conv2d(x[:, :5], (weight, bias))
    with pytest.raises(TypeError, match=r"bias of grouped: got dtype torch\.float64"):
        gelu_grouped_conv2d(x, (weight, bias.double()))
