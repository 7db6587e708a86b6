"""Batch norm and ReLU after a convolution: the proof ladder, and against ``nn.BatchNorm2d``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx_kernels import (
    _backends,
    batch_norm_relu,
    concat_conv2d,
    fold_batch_norm,
    upsample_conv2d,
)
from spectralx_kernels.upsample import reference
from spectralx_kernels.upsample.convolution import UPSAMPLE_CONV2D_MOMENTS
from spectralx_kernels.upsample.norm import BATCH_NORM_RELU, CHANNEL_MOMENTS
from tests.kernels import ladder
from tests.kernels.upsample.test_conv import draw
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Fewer pixels than a part, several parts, many; channels that fill no vector and several tiles.
SHAPES = [(2, 3, 4, 5), (3, 70, 9, 7), (1, 17, 2, 4), (2, 5, 40, 40)]


def arguments(
    shape: tuple[int, ...] = (2, 3, 4, 5),
    *,
    relu: bool = True,
    affine: bool = True,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Any, ...]:
    """Of the operator, with moments that are not those of x."""
    channels = shape[1]
    moments = torch.stack([draw(channels, seed=5), draw(channels, seed=6).square() + 0.5])
    weight, bias = (draw(channels, seed=2), draw(channels, seed=3)) if affine else (None, None)
    x = (draw(*shape) * 2).contiguous(memory_format=layout)
    return x, moments, weight, bias, 1e-5, relu, False


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_ladder(relu: bool, affine: bool) -> None:
    args = arguments(relu=relu, affine=affine)
    for batch in (True, False):
        given = (*args[:6], batch)
        ladder.check_contract(BATCH_NORM_RELU, given)
        leaves = ladder.cast(given, torch.float64, grad=True)
        leaves[1] = reference.channel_moments(leaves[0]) if batch else leaves[1].detach()

        def run(x: Tensor, *rest: Any, leaves: list[Any] = leaves, batch: bool = batch) -> Tensor:
            moments = reference.channel_moments(x) if batch else leaves[1]
            out: Tensor = BATCH_NORM_RELU.op(x, moments, *rest)
            return out

        assert torch.autograd.gradcheck(run, (leaves[0], *leaves[2:]))
    torch.library.opcheck(CHANNEL_MOMENTS.op, (args[0].float(),))
    ladder.check_repeats(BATCH_NORM_RELU, args)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_module(
    shape: tuple[int, ...], dtype: torch.dtype, training: bool, backend: str
) -> None:
    """Output, gradients, running statistics; both layouts; no error beyond the module's."""
    if backend not in _backends.available(BATCH_NORM_RELU.name, "cpu", dtype):
        pytest.skip(f"{backend} does not take {dtype} here")
    channels = shape[1]
    norm = nn.BatchNorm2d(channels, eps=1e-3).double().train(training)
    for place, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
        assert tensor is not None
        tensor.data.copy_(draw(channels, seed=place).abs() + 0.1 if place == 3 else
                          draw(channels, seed=place))  # fmt: skip
    upstream = draw(*shape, seed=9).to(dtype)

    def outcome(
        run: Callable[[Tensor, nn.BatchNorm2d], Tensor], x: Tensor, wide: torch.dtype
    ) -> list[Tensor]:
        own = copy.deepcopy(norm).to(wide)
        x = x.detach().requires_grad_()
        out = run(x, own)
        grads = torch.autograd.grad(out, (x, own.weight, own.bias), upstream.to(out))
        assert own.running_mean is not None
        assert own.running_var is not None
        assert own.num_batches_tracked is not None
        assert int(own.num_batches_tracked) == int(training)
        return [out, own.running_mean, own.running_var, *grads]

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for layout in LAYOUTS:
        x = (draw(*shape) * 2 + draw(channels, seed=4).view(-1, 1, 1) * 5).to(dtype)
        x = x.contiguous(memory_format=layout)
        exact = outcome(lambda v, n: F.relu(n(v)), x.double(), torch.float64)
        plain = outcome(lambda v, n: F.relu(n(v)), x, wide)
        found = outcome(lambda v, n: batch_norm_relu(v, n, backend=backend), x, wide)
        assert found[0].is_contiguous(memory_format=layout)
        assert found[3].is_contiguous(memory_format=layout)
        for place, (ours, theirs, truth) in enumerate(zip(found, plain, exact, strict=True)):
            factor = FORWARD_FACTOR if place < 3 else BACKWARD_FACTOR
            bound = factor * ladder.relative_error(theirs, truth) + ROUND_OFF[dtype]
            assert ladder.relative_error(ours, truth) <= bound, place


def test_a_mean_far_from_zero(backend: str) -> None:
    """The variance is that of deviations, not a difference of large squares."""
    mean = 3e3
    x = (draw(2, 4, 20, 20) + mean).float()
    found = CHANNEL_MOMENTS(x, backend=backend).double()
    error = found / reference.channel_moments(x.double()) - 1
    # The mean of a part is off by its round-off, and the variance by what that is to a deviation.
    assert error.abs().max() <= mean * ROUND_OFF[torch.float32]


@pytest.mark.parametrize("by_taps", [True, False], ids=["taps", "map"])
def test_moments_of_a_convolution(by_taps: bool) -> None:
    """They are those of what is returned, gathered while it is written; the ladder of both."""
    args = (draw(2, 3, 4, 3), draw(5, 3, 3, 3, seed=1), draw(5, seed=2),
            draw(2, 5, 9, 7, seed=3), [9, 7], [1, 1], False, by_taps)  # fmt: skip
    small = (args[0][:1], args[1][:2], None, None, [5, 4], [1, 0], True, by_taps)
    ladder.check_contract(UPSAMPLE_CONV2D_MOMENTS, small)
    ladder.check_gradients(UPSAMPLE_CONV2D_MOMENTS, small)
    ladder.check_repeats(UPSAMPLE_CONV2D_MOMENTS, small)
    # Chunks of 64 channels, one of them not full.
    wide = (args[0], draw(70, 3, 3, 3, seed=1), None, draw(2, 70, 9, 7, seed=3), *args[4:])
    for dtype in DTYPES:
        ladder.check_accuracy(UPSAMPLE_CONV2D_MOMENTS, args, dtype)
        for layout in LAYOUTS:
            given = ladder.cast(wide, dtype)
            given[0] = given[0].contiguous(memory_format=layout)
            out, moments = UPSAMPLE_CONV2D_MOMENTS.op(*given)
            exact = reference.channel_moments(out.double())
            assert ladder.relative_error(moments, exact) <= ROUND_OFF[torch.float32]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_convolution_with_norm(training: bool, backend: str) -> None:
    """Of one map and of several, by either algorithm; folded where statistics are fixed."""
    dtype = ladder.widest(UPSAMPLE_CONV2D_MOMENTS, backend)
    maps = [draw(2, 3, 3, 2, seed=1).to(dtype), draw(2, 5, 8, 6, seed=2).to(dtype)]
    weight = (draw(7, 8, 3, 3, seed=4) / 9).to(dtype)
    norm = nn.BatchNorm2d(7).to(dtype).train(training)
    other = copy.deepcopy(norm)
    resized = F.interpolate(maps[0], size=(8, 6), mode="bilinear")
    expected = F.relu(other(F.conv2d(torch.cat([resized, maps[1]], 1), weight, padding=1)))
    for algorithm in ("taps", "map"):
        own = copy.deepcopy(norm)
        found = concat_conv2d(
            maps, weight, size=(8, 6), norm=own, relu=True, algorithm=algorithm, backend=backend
        )
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(own.running_var, other.running_var)
    if not training:
        single = upsample_conv2d(maps[0], weight[:, :3], size=8, norm=norm, backend=backend)
        folded = fold_batch_norm(weight[:, :3], None, norm)
        torch.testing.assert_close(upsample_conv2d(maps[0], *folded, size=8), single)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_and_modes(momentum: float | None) -> None:
    """A cumulative average, and a norm that has none to keep."""
    ours, theirs = (nn.BatchNorm2d(3, momentum=momentum) for _ in range(2))
    for seed in range(3):
        x = draw(2, 3, 4, 4, seed=seed).float()
        torch.testing.assert_close(batch_norm_relu(x, ours, relu=False), theirs(x))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    bare = nn.BatchNorm2d(3, track_running_stats=False, affine=False)
    for mode in (True, False):
        torch.testing.assert_close(batch_norm_relu(x, bare.train(mode)), F.relu(bare(x)))


def test_compiles_and_autocasts() -> None:
    norm = nn.BatchNorm2d(5)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return upsample_conv2d(x, weight, size=9, norm=norm, relu=True, algorithm="taps")

    args = (draw(2, 3, 4, 3), draw(5, 3, 3, 3, seed=1))
    ladder.check_compiles(run, args, compiler="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = run(*(arg.float() for arg in args))
    assert out.dtype == torch.bfloat16
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == torch.float32


def test_nan_stays_in_its_channel(backend: str) -> None:
    x = draw(2, 3, 4, 4).float()
    x[1, 1, 2, 2] = torch.nan
    out = batch_norm_relu(x, nn.BatchNorm2d(3), backend=backend)
    assert out[:, 1].isnan().all()
    assert out[:, ::2].isfinite().all()
    out = batch_norm_relu(x, nn.BatchNorm2d(3).eval(), backend=backend)
    assert torch.equal(out.isnan(), x.isnan())


def test_checked() -> None:
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match=r"x: got shape \[1, 3, 1, 1\] in training, expected more"):
        batch_norm_relu(draw(1, 3, 1, 1).float(), norm)
    with pytest.raises(ValueError, match=r"x: got shape \[2, 4, 2, 2\], expected \[2, 3, rows"):
        batch_norm_relu(draw(2, 4, 2, 2).float(), norm)
    with pytest.raises(ValueError, match=r"moments: got shape \[3\], expected \[2, 3\]"):
        batch_norm_relu(draw(2, 3, 2, 2).float(), norm, moments=torch.ones(3))
    with pytest.raises(TypeError, match=r"moments: got dtype torch.complex64"):
        batch_norm_relu(
            draw(2, 3, 2, 2).float(), norm, moments=torch.ones(2, 3).to(torch.complex64)
        )
    with pytest.raises(ValueError, match="moments: got device meta, expected cpu as x"):
        batch_norm_relu(draw(2, 3, 2, 2).float(), norm, moments=torch.ones(2, 3, device="meta"))
    with pytest.raises(ValueError, match="norm: got device cpu, expected meta as x"):
        batch_norm_relu(draw(2, 3, 2, 2).float().to("meta"), norm)
    assert norm.num_batches_tracked == 0
    with pytest.raises(ValueError, match="norm: got one without running statistics"):
        fold_batch_norm(draw(3, 2, 1, 1), None, nn.BatchNorm2d(3, track_running_stats=False))
    assert batch_norm_relu(torch.empty(0, 3, 2, 2), norm.eval()).shape == (0, 3, 2, 2)


def test_strided_channels(backend: str) -> None:
    """Moments, weight and bias with gaps between their values: the same output and gradients."""
    plain = ladder.cast(arguments(), torch.float32, grad=True, constants=(1,))
    apart = list(plain)
    for place in (1, 2, 3):
        gaps = torch.stack([plain[place].detach(), torch.full_like(plain[place], 1e3)], -1)[..., 0]
        apart[place] = gaps.requires_grad_(place > 1)
    apart[0] = plain[0].detach().clone().requires_grad_()
    (found, grads), (expected, truth) = (
        ladder.run_with_gradients(lambda *v: BATCH_NORM_RELU(*v, backend=backend), args)
        for args in (apart, plain)
    )
    assert ladder.relative_error(found[0], expected[0]) <= ROUND_OFF[torch.float32]
    for name, grad in truth.items():
        assert ladder.relative_error(grads[name], grad) <= ROUND_OFF[torch.float32], name
