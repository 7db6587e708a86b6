"""`residual_halving`: contract, gradients, accuracy, what it computes and what it keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx_kernels.hypert import residual_halving
from spectralx_kernels.hypert.stem import RESIDUAL_HALVING
from tests.kernels import ladder
from tests.kernels.ladder import relative_error


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def stem_args(
    bands: int | None = 2, *, middle: int = 6, outs: int = 4, norm: bool = True,
    half_norm: bool = True, size: tuple[int, int] = (6, 4), batch: int = 2, keep: bool = True,
) -> list[Any]:  # fmt: skip
    """Arguments of the operator; without `bands`, `middle` channels come in."""
    lift = [None, None] if bands is None else [draw(middle, bands, 1, 1), draw(middle)]
    norms = [
        [1 + 0.1 * draw(width), 0.3 * draw(width, seed=1)] if wanted else [None, None]
        for width, wanted in ((middle, norm), (outs, half_norm))
    ]
    return [
        draw(batch, bands or middle, *size), *lift, 0.3 * draw(middle, middle, 3, 3), draw(middle),
        *norms[0], 0.3 * draw(outs, middle, 2, 2), draw(outs), *norms[1], 1e-5, keep,
    ]  # fmt: skip


CASES = {
    "folded": stem_args(),
    "one band": stem_args(1, size=(4, 4)),
    "too many bands to fold": stem_args(5, size=(4, 6)),
    "no lift": stem_args(None),
    "folded norms": stem_args(norm=False, half_norm=False),
    "no lift, folded norms": stem_args(None, norm=False, half_norm=False),
    "one norm": stem_args(None, norm=False, middle=3, outs=5),
    "the other norm": stem_args(3, half_norm=False, middle=16, outs=33),
}
cases = pytest.mark.parametrize("args", CASES.values(), ids=CASES.keys())
some = pytest.mark.parametrize("args", [CASES["folded"], CASES["no lift, folded norms"]])


@some
def test_contract(args):
    ladder.check_contract(RESIDUAL_HALVING, args)


@cases
def test_gradients(args):
    """Of the output alone: tables have none."""
    leaves = ladder.cast(args, torch.float64, grad=True)
    for run in (RESIDUAL_HALVING.op, RESIDUAL_HALVING.reference):
        assert torch.autograd.gradcheck(
            lambda *values, run=run: run(*values)[0],
            tuple(leaves),
            fast_mode=run is RESIDUAL_HALVING.reference,
        )


@some
def test_compiles(args):
    ladder.check_compiles(lambda *values: RESIDUAL_HALVING(*values)[0], args, compiler="aot_eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases
def test_accuracy(args, dtype):
    ladder.check_accuracy(RESIDUAL_HALVING, args, dtype)


@pytest.mark.parametrize("bands", [1, 6, None], ids=["folded", "not folded", "no lift"])
@pytest.mark.parametrize("trained", [False, True])
def test_strips_are_the_whole(bands, trained):
    """Six rows, so wide that the C++ kernels take two at a time: first, between and last."""
    width = 2 ** (16 if trained else 18)
    size: dict[str, Any] = {"middle": 8, "outs": 3, "batch": 1, "size": (6, width)}
    args = stem_args(bands, norm=trained, half_norm=trained, keep=trained, **size)
    found, expected = (
        ladder.run_with_gradients(
            lambda *values, run=run: run(*values)[0], ladder.cast(args, torch.float32, grad=trained)
        )
        for run in (RESIDUAL_HALVING.op, RESIDUAL_HALVING.reference)
    )
    assert relative_error(found[0][0], expected[0][0]) < 1e-5
    assert len(expected[1]) == (sum(isinstance(arg, Tensor) for arg in args) if trained else 0)
    for place in (0, 1, 2, 3, 5, 6, 7, 9, 10):  # those of biases before a norm are zero
        name = f"argument {place}"
        if name in expected[1]:
            assert relative_error(found[1][name], expected[1][name]) < 1e-4, name


@some
def test_repeats(args):
    ladder.check_repeats(RESIDUAL_HALVING, args)


def test_tables_are_statistics(backend):
    args = ladder.cast(stem_args(batch=3), torch.float32)
    args[4] += 100.0  # a mean far from zero takes nothing from the variance
    _, table, half_table = RESIDUAL_HALVING(*args, backend=backend)
    lifted = F.conv2d(args[0].double(), args[1].double(), args[2].double())
    convolved = F.conv2d(lifted, args[3].double(), args[4].double(), padding=1)
    variance, mean = torch.var_mean(convolved, (0, 2, 3), correction=0)
    scale = args[5].double() * (variance + 1e-5).rsqrt()
    expected = torch.stack([mean, variance, scale, args[6].double()])
    torch.testing.assert_close(table.double(), expected, rtol=1e-4, atol=1e-4)
    assert half_table.shape == (4, 4)


def test_a_first_pixel_far_aside_takes_nothing_from_the_variance(backend):
    args = ladder.cast(stem_args(None, batch=6, size=(8, 8)), torch.float32)
    args[0][0, :, 0, 0] *= 100
    _, table, _ = RESIDUAL_HALVING(*args, backend=backend)
    convolved = F.conv2d(args[0].double(), args[3].double(), args[4].double(), padding=1)
    variance = convolved.var((0, 2, 3), correction=0)
    torch.testing.assert_close(table[1].double(), variance, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bands", [1, 2, 5, None])
def test_padding_is_zero_after_the_lift(backend, bands):
    """The lift's bias does not reach into the padding."""
    args = ladder.cast(stem_args(bands, norm=False, half_norm=False), torch.float32)
    if bands is not None:
        args[2] *= 10
    out = RESIDUAL_HALVING(*args, backend=backend)[0]
    x = args[0] if bands is None else F.conv2d(args[0], args[1], args[2])
    expected = F.conv2d(
        x + F.gelu(F.conv2d(x, args[3], args[4], padding=1)), args[7], args[8], stride=2
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_where_nothing_trains():
    kept = RESIDUAL_HALVING.op(*ladder.cast(stem_args(keep=False), torch.float32))
    assert [tensor.numel() for tensor in kept[3:]] == [0, 0]
    kept = RESIDUAL_HALVING.op(*ladder.cast(stem_args(), torch.float32))
    assert [tuple(tensor.shape) for tensor in kept[3:]] == [(2, 6, 6, 4), (2, 4, 3, 2)]


@pytest.mark.parametrize("only", [0, 1, 3, 5, 7, 9])
@pytest.mark.parametrize("bands", [2, 5, None])
def test_one_gradient_alone_is_the_same(bands, only):
    args = stem_args(bands)
    if args[only] is None:
        return
    everything = ladder.run_with_gradients(
        RESIDUAL_HALVING.op, ladder.cast(args, torch.float64, grad=True)
    )[1]
    leaves = ladder.cast(args, torch.float64)
    leaves[only].requires_grad_()
    alone = ladder.run_with_gradients(RESIDUAL_HALVING.op, leaves)[1]
    assert alone.keys() == {f"argument {only}"}
    name = f"argument {only}"
    torch.testing.assert_close(alone[name], everything[name])


def test_layouts_of_the_input_agree():
    args = ladder.cast(stem_args(), torch.float32)
    last = [args[0].contiguous(memory_format=torch.channels_last), *args[1:]]
    found, other = (
        ladder.run_with_gradients(RESIDUAL_HALVING.op, ladder.cast(each, torch.float32, grad=True))
        for each in (args, last)
    )
    torch.testing.assert_close(found[0], other[0])
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, other[1][name])


def test_no_images_and_nan(backend):
    args = ladder.cast(stem_args(batch=0), torch.float32, grad=True)
    out = RESIDUAL_HALVING(*args, backend=backend)[0]
    assert out.shape == (0, 4, 3, 2)
    args = ladder.cast(stem_args(norm=False, half_norm=False), torch.float32)
    args[0][0, 1, 2, 1] = torch.nan
    out = RESIDUAL_HALVING(*args, backend=backend)[0]
    assert out[0, :, 0:2, 0:2].isnan().all()
    assert out[1].isfinite().all()
    args = ladder.cast(stem_args(), torch.float32)
    args[0][0, 1, 2, 1] = torch.nan
    assert RESIDUAL_HALVING(*args, backend=backend)[0].isnan().all()


def test_the_batch_norm_of_a_constant_map_is_its_shift():
    args = ladder.cast(stem_args(None, batch=1, size=(2, 2)), torch.float32)
    args[3].zero_()
    args[4].fill_(3.0)
    table = RESIDUAL_HALVING(*args)[1]
    torch.testing.assert_close(table[0], torch.full((6,), 3.0))
    assert not table[1].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 3, 3, 4)}, ValueError, "x: got 3 x 4 pixels, expected even"),
        ({"x": torch.zeros(3, 4, 4)}, ValueError, "x: got shape"),
        ({"lift": (torch.zeros(3, 2, 1, 1), torch.zeros(3))}, ValueError, "weight of lift: got"),
        ({"norm": (torch.ones(2), torch.zeros(2))}, ValueError, "weight of norm: got shape"),
        ({"half_norm": (torch.ones(5), torch.zeros(4))}, ValueError, "bias of half_norm: got"),
        ({"halving": (torch.zeros(5, 3, 3, 3), torch.zeros(5))}, ValueError, "of halving: got"),
        ({"norm": (torch.ones(3).double(), torch.zeros(3))}, TypeError, "weight of norm: got"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
    ],
)
def test_rejects(change, error, message):
    options: dict[str, Any] = {
        "x": torch.zeros(1, 3, 4, 4),
        "convolution": (torch.zeros(3, 3, 3, 3), torch.zeros(3)),
        "halving": (torch.zeros(5, 3, 2, 2), torch.zeros(5)),
    }
    with pytest.raises(error, match=message):
        residual_halving(**(options | change))


def test_gradients_share_no_memory(backend):
    """An operator's outputs are its own, each of them."""
    leaves = ladder.cast(CASES["no lift"], torch.float32, grad=True)
    out = RESIDUAL_HALVING(*leaves, backend=backend)[0]
    wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    grads = torch.autograd.grad(out.sum(), wanted)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)


def test_strided_weights(backend):
    """Weights of norms with gaps between them, maps channels last: the same gradients."""
    plain = ladder.cast(CASES["no lift"], torch.float32, grad=True)
    apart = ladder.cast(CASES["no lift"], torch.float32)
    for place, value in enumerate(apart):
        if isinstance(value, Tensor):
            spread = value.repeat_interleave(2, dim=-1)[..., ::2] if value.dim() == 1 else value
            if value.dim() == 4:
                spread = value.contiguous(memory_format=torch.channels_last)
            apart[place] = spread.detach().requires_grad_()
    results = [
        ladder.run_with_gradients(lambda *v: RESIDUAL_HALVING(*v, backend=backend)[0], args)
        for args in (plain, apart)
    ]
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-4, msg=name)
