"""What stands around attention: contract, gradients, accuracy, edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.hypert import dense
from spectralx_kernels.hypert.dense import feed_forward, linear_add, norm_linear
from tests.kernels import ladder
from tests.tolerances import ROUND_OFF


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def norm_args(*rows: int, bias: bool = True) -> list[Any]:
    return [draw(*rows, 5), 1 + 0.1 * draw(5), 0.1 * draw(5), draw(3, 5),
            draw(3) if bias else None, 1e-5]  # fmt: skip


def add_args(*rows: int, bias: bool = True) -> list[Any]:
    return [draw(*rows, 5), draw(3, 5), draw(3) if bias else None, draw(*rows, 3, seed=1)]


def forward_args(*rows: int, residual: bool = True, bias: bool = True) -> list[Any]:
    out = 5 if residual else 4
    return [draw(*rows, 5), 1 + 0.1 * draw(5), 0.1 * draw(5), draw(7, 5), draw(7) if bias else None,
            draw(out, 7), draw(out) if bias else None, residual, 1e-5]  # fmt: skip


CASES = [
    pytest.param(dense.NORM_LINEAR, norm_args(2, 3), id="norm_linear"),
    pytest.param(dense.NORM_LINEAR, norm_args(3, bias=False), id="norm_linear-no-bias"),
    pytest.param(dense.LINEAR_ADD, add_args(2, 3), id="linear_add"),
    pytest.param(dense.LINEAR_ADD, add_args(4, bias=False), id="linear_add-no-bias"),
    pytest.param(dense.FEED_FORWARD, forward_args(2, 3), id="feed_forward"),
    pytest.param(
        dense.FEED_FORWARD, forward_args(2, 3, residual=False, bias=False), id="feed_forward-plain"
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_contract(operator, args):
    ladder.check_contract(operator, args)


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_gradients(operator, args):
    ladder.check_gradients(operator, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("operator", "args"), CASES)
def test_accuracy(operator, args, dtype):
    ladder.check_accuracy(operator, args, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_accuracy_of_several_chunks(dtype):
    ladder.check_accuracy(dense.FEED_FORWARD, forward_args(1030), dtype)


@pytest.mark.parametrize(("operator", "args"), CASES)
def test_repeats(operator, args):
    ladder.check_repeats(operator, args)


@pytest.mark.parametrize("wanted", range(7))
def test_one_gradient_at_a_time(wanted):
    """What is frozen costs nothing and changes nothing."""
    args = forward_args(2, 3)
    everything = ladder.run_with_gradients(
        dense.FEED_FORWARD.op, ladder.cast(args, torch.float64, grad=True)
    )[1]
    alone = ladder.cast(args, torch.float64)
    alone[wanted].requires_grad_()
    found = ladder.run_with_gradients(dense.FEED_FORWARD.op, alone)[1]
    assert found.keys() == {f"argument {wanted}"}
    name = f"argument {wanted}"
    torch.testing.assert_close(found[name], everything[name])


def test_no_rows_and_strided_rows():
    for operator, args in (
        (dense.NORM_LINEAR, norm_args(0)),
        (dense.FEED_FORWARD, forward_args(0)),
    ):
        for backend in _backends.available(operator.name, "cpu"):
            leaves = ladder.cast(args, torch.float32, grad=True)
            out = operator(*leaves, backend=backend)
            assert out.shape == (0, args[3].shape[0] if operator is dense.NORM_LINEAR else 5)
            out.sum().backward()
            assert not leaves[3].grad.any()
    x = draw(5, 4, 3).permute(2, 1, 0)
    args = forward_args(1)[1:7]
    torch.testing.assert_close(feed_forward(x, *args), feed_forward(x.contiguous(), *args))


def test_nan_stays_in_its_row():
    args = ladder.cast(forward_args(2, 3), torch.float32)
    args[0][1, 2, 0] = torch.nan
    out = feed_forward(*args[:7])
    assert out[1, 2].isnan().all()
    assert out.isnan().sum() == 5


def test_nothing_is_kept_but_inputs():
    """No norm and no hidden layer."""
    kept: list[Tensor] = []
    args = ladder.cast(forward_args(2, 3), torch.float32, grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        out = dense.FEED_FORWARD.op(*args)
    pointers = {arg.data_ptr() for arg in args if isinstance(arg, Tensor)}
    assert kept
    assert all(tensor.data_ptr() in pointers for tensor in kept)
    assert out.requires_grad


@pytest.mark.parametrize(
    ("function", "args", "position", "value", "error", "message"),
    [
        (norm_linear, norm_args(2), 0, torch.zeros(2, 5).long(), TypeError, "x: got dtype"),
        (norm_linear, norm_args(2), 1, torch.zeros(4), ValueError, "norm_weight: got shape"),
        (norm_linear, norm_args(2), 3, torch.zeros(3, 4), ValueError, "weight: got shape"),
        (norm_linear, norm_args(2), 4, torch.zeros(4), ValueError, "bias: got shape"),
        (linear_add, add_args(2), 3, torch.zeros(2, 4), ValueError, "addend: got shape"),
        (linear_add, add_args(2), 1, torch.zeros(3, 5).double(), TypeError, "weight: got dtype"),
        (feed_forward, forward_args(2), 5, torch.zeros(5, 6), ValueError, "fc2_weight: got shape"),
        (feed_forward, forward_args(2, bias=False), 5, torch.zeros(4, 7), ValueError,
         "fc2_weight: got 4 outputs, expected 5"),
    ],
)  # fmt: skip
def test_rejects(function, args, position, value, error, message):
    args = ladder.cast([arg for arg in args if not isinstance(arg, (bool, float))], torch.float32)
    args[position] = value
    with pytest.raises(error, match=f"^{message}"):
        function(*args)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_biases(dtype):
    """Biases with gaps between their values: every other of a longer row, a column."""
    for operator, args, places in (
        (dense.NORM_LINEAR, norm_args(2, 3), (4,)),
        (dense.LINEAR_ADD, add_args(2, 3), (2,)),
        (dense.FEED_FORWARD, forward_args(2, 3), (4, 6)),
    ):
        plain = ladder.cast(args, dtype)
        apart = list(plain)
        for place in places:
            apart[place] = torch.stack([plain[place], torch.full_like(plain[place], 1e3)], 1)[:, 0]
        for backend in _backends.available(operator.name, "cpu"):
            found, expected = (operator(*each, backend=backend) for each in (apart, plain))
            assert ladder.relative_error(found, expected) <= ROUND_OFF[dtype], operator.name
