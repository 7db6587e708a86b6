"""upsample_conv2d: both algorithms against interpolate and conv2d, borders above all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels.upsample import UpsampleConv2d, upsample_conv2d
from spectralx_kernels.upsample.convolution import (
    UPSAMPLE_CONV2D,
    _few_pixels_on_a_cpu,
    taps_are_cheaper,
)
from tests.kernels import ladder
from tests.tolerances import ROUND_OFF


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ordinary(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """The two calls that the operator replaces."""
    upsampled = F.interpolate(
        x, size=options["size"], mode="bilinear", align_corners=options["align_corners"]
    )
    return F.conv2d(upsampled, weight, bias, padding=options["padding"])


@pytest.mark.parametrize("by_taps", [False, True], ids=["map", "taps"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_ladder(by_taps: bool, with_bias: bool) -> None:
    bias = draw(2, seed=3) if with_bias else None
    args = (
        draw(2, 3, 3, 2),
        draw(2, 3, 3, 1, seed=1),
        bias,
        None,
        [5, 3],
        [1, 0],
        False,
        by_taps,
        False,
    )
    ladder.check_contract(UPSAMPLE_CONV2D, args)
    ladder.check_gradients(UPSAMPLE_CONV2D, args)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ladder.check_accuracy(UPSAMPLE_CONV2D, args, dtype)
    ladder.check_repeats(UPSAMPLE_CONV2D, args)


@pytest.mark.parametrize("algorithm", ["map", "taps"])
def test_compiles(algorithm: str) -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return upsample_conv2d(x, weight, bias, size=(9, 7), algorithm=algorithm)

    args = (draw(2, 3, 4, 3), draw(5, 3, 3, 3, seed=1), draw(5, seed=2))
    ladder.check_compiles(run, args, compiler="aot_eager")


@given(
    batch=st.integers(0, 2),
    channels=st.integers(1, 3),
    small=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    halves=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    extra=st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    align_corners=st.booleans(),
    reference=st.booleans(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_taps_agree_with_the_ordinary_path(
    batch: int,
    channels: int,
    small: tuple[int, int],
    size: tuple[int, int],
    halves: tuple[int, int],
    extra: tuple[int, int],
    align_corners: bool,
    reference: bool,
) -> None:
    """Any scale (also below 1), kernel, padding (also none and too much), borders included."""
    padding = tuple(max(half + more, 0) for half, more in zip(halves, extra, strict=True))
    kernel = tuple(2 * half + 1 for half in halves)
    # At least one output pixel.
    size = tuple(  # type: ignore[assignment]
        max(length, side - 2 * pad) for length, side, pad in zip(size, kernel, padding, strict=True)
    )
    args = (draw(batch, channels, *small), draw(2, channels, *kernel, seed=1), draw(2, seed=2))
    options: dict[str, Any] = {"size": size, "padding": padding, "align_corners": align_corners}
    backend = "eager" if reference else None
    expected, expected_grads = ladder.run_with_gradients(
        lambda *values: ordinary(*values, **options), ladder.cast(args, torch.float64, grad=True)
    )
    for algorithm in ("map", "taps", "auto"):
        found, grads = ladder.run_with_gradients(
            lambda *values, algorithm=algorithm: upsample_conv2d(
                *values, algorithm=algorithm, backend=backend, **options
            ),
            ladder.cast(args, torch.float64, grad=True),
        )
        assert found[0].shape == expected[0].shape
        assert ladder.relative_error(found[0], expected[0]) <= ROUND_OFF[torch.float64], algorithm
        for name, grad in expected_grads.items():
            error = ladder.relative_error(grads[name], grad)
            assert error <= ROUND_OFF[torch.float64], (algorithm, name)


@pytest.mark.parametrize("align_corners", [False, True])
def test_borders_pixel_by_pixel(align_corners: bool, backend: str) -> None:
    """Every output pixel of a one-hot input and a one-hot tap: no shift is off by one."""
    dtype = ladder.widest(UPSAMPLE_CONV2D, backend)
    weight = torch.eye(9, dtype=dtype).view(9, 1, 3, 3)
    x = torch.eye(12, dtype=dtype).view(12, 1, 4, 3)
    options: dict[str, Any] = {"size": (10, 9), "padding": (1, 1), "align_corners": align_corners}
    found = upsample_conv2d(x, weight, algorithm="taps", backend=backend, **options)
    torch.testing.assert_close(found, ordinary(x, weight, None, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_taps_are_as_accurate_as_the_ordinary_path(dtype: torch.dtype) -> None:
    args = (draw(2, 24, 7, 7), draw(16, 24, 3, 3, seed=1) / 15, draw(16, seed=2))
    options: dict[str, Any] = {"size": (28, 21), "padding": (1, 1), "align_corners": False}
    rounded = ladder.cast(ladder.cast(args, dtype), torch.float64, grad=True)
    exact, exact_grads = ladder.run_with_gradients(lambda *v: ordinary(*v, **options), rounded)
    plain, plain_grads = ladder.run_with_gradients(
        lambda *v: ordinary(*v, **options), ladder.cast(args, dtype, grad=True)
    )
    found, grads = ladder.run_with_gradients(
        lambda *v: upsample_conv2d(*v, algorithm="taps", **options),
        ladder.cast(args, dtype, grad=True),
    )
    own = ladder.relative_error(plain[0], exact[0])
    assert ladder.relative_error(found[0], exact[0]) <= 2 * own + ROUND_OFF[dtype]
    for name, grad in exact_grads.items():
        own = ladder.relative_error(plain_grads[name], grad)
        assert ladder.relative_error(grads[name], grad) <= 3 * own + ROUND_OFF[dtype], name


def test_taps_run_where_they_pay() -> None:
    """The paper's upsamplings yes; same size, downsampling and narrow maps no."""
    for channels, small, size in ((1024, 14, 56), (1024, 14, 28), (512, 7, 56), (512, 28, 56)):
        shapes = (1, channels, small, small), (channels, channels, 3, 3)
        assert taps_are_cheaper(*shapes, (size, size), (1, 1))
    for channels, small, size in ((1024, 14, 14), (1024, 14, 7), (4, 14, 56)):
        shapes = (1, channels, small, small), (channels, channels, 3, 3)
        assert not taps_are_cheaper(*shapes, (size, size), (1, 1))
    # On a CPU also where the weight is most of the work.
    for side, channels, few in ((14, 1024, True), (7, 512, True), (28, 512, False), (8, 4, False)):
        x, weight = draw(2, 1, side, side).expand(2, channels, side, side), draw(1, 1, 3, 3)
        assert _few_pixels_on_a_cpu(x, weight, (side, side)) == few
        assert not _few_pixels_on_a_cpu(x.to("meta"), weight, (side, side))
        assert not _few_pixels_on_a_cpu(x, weight, (side + 1, side))


@pytest.mark.parametrize("algorithm", ["map", "taps"])
def test_nan_stays_nan(algorithm: str, backend: str) -> None:
    dtype = ladder.widest(UPSAMPLE_CONV2D, backend)
    x, weight = draw(1, 2, 4, 4).to(dtype), draw(3, 2, 3, 3).to(dtype)
    x[0, 1, 2, 2] = torch.nan
    out = upsample_conv2d(x, weight, size=8, algorithm=algorithm, backend=backend)
    surroundings = ordinary(
        x, weight, None, size=(8, 8), padding=(1, 1), align_corners=False
    ).isnan()
    assert out.isnan()[surroundings].all()


def test_autocast_computes_in_its_dtype() -> None:
    x, weight = draw(1, 2, 4, 4).float(), draw(3, 2, 3, 3).float().requires_grad_()
    for algorithm in ("map", "taps"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = upsample_conv2d(x.bfloat16(), weight, size=8, algorithm=algorithm)
        assert out.dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(out.float().square().sum(), weight)
        assert grad.dtype == torch.float32


def test_non_contiguous_input() -> None:
    x, weight = draw(2, 3, 5, 4), draw(2, 3, 3, 3, seed=1)
    channels_last = x.to(memory_format=torch.channels_last)
    strided = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for algorithm in ("map", "taps"):
        expected = upsample_conv2d(x, weight, size=9, algorithm=algorithm)
        for variant in (
            upsample_conv2d(channels_last, weight, size=9, algorithm=algorithm),
            upsample_conv2d(x, strided, size=9, algorithm=algorithm),
        ):
            torch.testing.assert_close(variant, expected)


def test_module_is_a_convolution_with_the_same_state_dict() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(3, 5, (3, 1), padding=(1, 0))
    module = UpsampleConv2d(3, 5, (3, 1))
    module.load_state_dict(plain.state_dict())
    x = draw(2, 3, 4, 4).float()
    expected = plain(F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=False))
    torch.testing.assert_close(module(x, (7, 9)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x: got shape \[2, 3, 4\], expected \[batch, channels"),
        ({"x": torch.zeros(2, 3, 0, 4)}, r"x: got shape \[2, 3, 0, 4\], expected channels"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "x: got dtype torch.int64"),
        ({"weight": torch.zeros(5, 2, 3, 3)}, r"weight: got shape \[5, 2, 3, 3\], expected"),
        ({"weight": torch.zeros(5, 3, 2, 3)}, "weight: got shape .* odd kernel sides"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, "weight: got shape .* at least 1 output channel"),
        ({"weight": torch.zeros(5, 3, 3, 3).double()}, "weight: got dtype torch.float64"),
        ({"weight": torch.zeros(5, 3, 3, 3, device="meta")}, "weight: got device meta"),
        ({"bias": torch.zeros(4)}, r"bias: got shape \[4\], expected \[5\]"),
        ({"size": (8, 0)}, r"size: got \(8, 0\), expected two integers of at least 1"),
        ({"size": (8, 8, 8)}, r"size: got \(8, 8, 8\), expected two integers"),
        ({"size": 1, "padding": 0}, r"size: got \[1, 1\], expected at least the kernel \[3, 3\]"),
        ({"padding": -1}, "padding: got -1, expected two integers of at least 0"),
        ({"algorithm": "fast"}, "algorithm: got 'fast', expected 'auto', 'taps' or 'map'"),
        ({"backend": "quick"}, "backend: got 'quick', expected one of"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "x": torch.zeros(2, 3, 4, 4),
        "weight": torch.zeros(5, 3, 3, 3),
        "size": 8,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        upsample_conv2d(**{**good, **change})
