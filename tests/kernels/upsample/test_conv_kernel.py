"""upsample_conv2d: epilogue, layouts, concatenation, threads and instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx_kernels.upsample import concat_conv2d, upsample_conv2d
from spectralx_kernels.upsample.convolution import UPSAMPLE_CONV2D
from tests.kernels import ladder
from tests.kernels.upsample.test_conv import draw, ordinary
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("by_taps", [False, True], ids=["map", "taps"])
@pytest.mark.parametrize("relu", [False, True], ids=["sum", "relu"])
def test_epilogue_ladder(by_taps: bool, relu: bool) -> None:
    addend = draw(2, 2, 5, 3, seed=4)
    bias = draw(2, seed=3)
    weight = draw(2, 3, 3, 1, seed=1)
    args = (draw(2, 3, 3, 2), weight, bias, addend, [5, 3], [1, 0], False, by_taps, relu)
    ladder.check_contract(UPSAMPLE_CONV2D, args)
    ladder.check_gradients(UPSAMPLE_CONV2D, args)
    for dtype in DTYPES:
        ladder.check_accuracy(UPSAMPLE_CONV2D, args, dtype)
    ladder.check_repeats(UPSAMPLE_CONV2D, args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "channels", "outs", "small", "size", "kernel"),
    [
        (3, 17, 130, (5, 3), (11, 13), (3, 3)),  # chunks of 64, 64 and 2
        (9, 5, 3, (4, 4), (8, 6), (1, 1)),  # two groups of images
        (1, 3, 70, (7, 5), (9, 16), (5, 5)),
        (2, 4, 66, (40, 33), (60, 100), (3, 5)),  # bands of rows, several groups backward
        (0, 4, 3, (2, 2), (4, 4), (3, 3)),
    ],
)
def test_sizes(
    batch: int,
    channels: int,
    outs: int,
    small: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    fan_in = channels * kernel[0] * kernel[1]
    args = (
        draw(batch, channels, *small),
        draw(outs, channels, *kernel, seed=1) / fan_in**0.5,
        draw(outs, seed=2),
    )
    options: dict[str, Any] = {
        "size": size,
        "padding": (kernel[0] // 2, kernel[1] // 2),
        "align_corners": False,
    }
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
    assert ladder.relative_error(found[0], exact[0]) <= FORWARD_FACTOR * own + ROUND_OFF[dtype]
    assert grads.keys() == exact_grads.keys()
    for name, grad in exact_grads.items():
        own = ladder.relative_error(plain_grads[name], grad)
        error = ladder.relative_error(grads[name], grad)
        assert error <= BACKWARD_FACTOR * own + ROUND_OFF[dtype], name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("rows", "columns"), [(33, 37), (2, 520), (32, 32)])
def test_tiles_of_two_by_two(rows: int, columns: int, layout: torch.memory_format) -> None:
    """Maps that are not resized, large enough for C++ to transform them: borders, odd sides."""
    x = draw(1, 64, rows, columns).contiguous(memory_format=layout)
    weight, addend = draw(70, 64, 3, 3, seed=1) / 24, draw(1, 70, rows, columns, seed=3)
    for bias, more, relu in ((None, None, False), (draw(70, seed=2), addend, True)):
        args = (x, weight, bias, more, [rows, columns], [1, 1], False, False, relu)
        ladder.check_accuracy(UPSAMPLE_CONV2D, args, torch.float32)


@pytest.mark.parametrize("algorithm", ["map", "taps"])
def test_layout_follows_the_input(algorithm: str, backend: str) -> None:
    """Channels last in, channels last out, the gradient too; the numbers are the same."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    weight = draw(70, 3, 3, 3, seed=1).to(dtype)
    upstream = draw(2, 70, 9, 8, seed=2).to(dtype)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = draw(2, 3, 5, 4).to(dtype).contiguous(memory_format=layout).requires_grad_()
        kernel = weight.contiguous(memory_format=layout).requires_grad_()
        out = upsample_conv2d(x, kernel, size=(9, 8), algorithm=algorithm, backend=backend)
        assert out.is_contiguous(memory_format=layout)
        results.append((out, *torch.autograd.grad(out, (x, kernel), upstream)))
        if backend != "eager":
            assert results[-1][1].is_contiguous(memory_format=layout)
    for one, other in zip(*results, strict=True):
        # Each may be off by its own round-off.
        assert ladder.relative_error(one, other) <= 2 * ROUND_OFF[dtype]


def test_weight_slices_and_strided_maps() -> None:
    """A slice of a wider weight, a cut-out of a map, an expanded upstream gradient."""
    wide, large = draw(6, 9, 3, 3), draw(2, 5, 8, 8, seed=1)
    weight, x = wide[:, 2:7], large[:, :, 1:6, ::2]
    results = []
    for w, v in ((weight, x), (weight.contiguous(), x.contiguous())):
        w, v = w.detach().requires_grad_(), v.detach().requires_grad_()
        out = upsample_conv2d(v, w, size=12, algorithm="taps")
        results.append((out, *torch.autograd.grad(out.sum(), (v, w))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_concatenation(dtype: torch.dtype, align_corners: bool) -> None:
    """The convolution of resized and concatenated maps, one of them at its own size."""
    maps = [draw(2, 3, 3, 2, seed=1), draw(2, 5, 8, 6, seed=2), draw(2, 2, 1, 1, seed=3)]
    args = (*maps, draw(7, 10, 3, 3, seed=4) / 9, draw(7, seed=5))

    def joined(*values: Tensor) -> Tensor:
        resized = [
            F.interpolate(each, size=(8, 6), mode="bilinear", align_corners=align_corners)
            for each in values[:3]
        ]
        return F.relu(F.conv2d(torch.cat(resized, dim=1), values[3], values[4], padding=1))

    def summed(*values: Tensor, algorithm: str) -> Tensor:
        return concat_conv2d(
            values[:3],
            values[3],
            values[4],
            size=(8, 6),
            align_corners=align_corners,
            relu=True,
            algorithm=algorithm,
        )

    exact, exact_grads = ladder.run_with_gradients(
        joined, ladder.cast(ladder.cast(args, dtype), torch.float64, grad=True)
    )
    plain, plain_grads = ladder.run_with_gradients(joined, ladder.cast(args, dtype, grad=True))
    for algorithm in ("map", "taps", "auto"):
        found, grads = ladder.run_with_gradients(
            lambda *v, algorithm=algorithm: summed(*v, algorithm=algorithm),
            ladder.cast(args, dtype, grad=True),
        )
        own = ladder.relative_error(plain[0], exact[0])
        assert ladder.relative_error(found[0], exact[0]) <= FORWARD_FACTOR * own + ROUND_OFF[dtype]
        for name, grad in exact_grads.items():
            own = ladder.relative_error(plain_grads[name], grad)
            error = ladder.relative_error(grads[name], grad)
            assert error <= BACKWARD_FACTOR * own + ROUND_OFF[dtype], (algorithm, name)


def test_scale_factor() -> None:
    x, weight = draw(1, 2, 5, 4), draw(3, 2, 3, 3, seed=1)
    found = upsample_conv2d(x, weight, scale_factor=(2.5, 1.6), algorithm="taps")
    torch.testing.assert_close(found, upsample_conv2d(x, weight, size=(12, 6), algorithm="map"))
    with pytest.raises(ValueError, match=r"scale_factor: got 0\.1, which makes"):
        upsample_conv2d(x, weight, scale_factor=0.1)
    with pytest.raises(ValueError, match="scale_factor: got 0, expected one or two positive"):
        upsample_conv2d(x, weight, scale_factor=0)
    with pytest.raises(ValueError, match="size: got 8 with scale_factor 2, expected one of them"):
        upsample_conv2d(x, weight, size=8, scale_factor=2)


def test_addend_and_maps_are_checked() -> None:
    x, weight = draw(1, 2, 5, 4), draw(3, 2, 3, 3, seed=1)
    with pytest.raises(ValueError, match=r"addend: got shape \[1, 3, 5, 4\], expected \[1, 3, 8"):
        upsample_conv2d(x, weight, size=8, addend=draw(1, 3, 5, 4))
    with pytest.raises(ValueError, match="maps: got none"):
        concat_conv2d([], weight)
    with pytest.raises(ValueError, match=r"weight: got shape .*, expected \[out, 4, rows"):
        concat_conv2d([x, x], weight)


_BITS = """
import hashlib, os, torch
from spectralx_kernels import upsample_conv2d
torch.set_num_threads(int(os.environ["THREADS"]))
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for shape, outs, size, algorithm in (
        ((3, 40, 6, 5), 150, (13, 20), "taps"),
        ((1, 64, 7, 7), 8, (14, 14), "taps"),
        ((1, 64, 33, 32), 70, (33, 32), "map"),
    ):
        if algorithm == "map" and dtype != torch.float32:
            continue  # the library's
        x = torch.randn(shape, generator=g).to(dtype).requires_grad_()
        w = torch.randn(outs, shape[1], 3, 3, generator=g).to(dtype).requires_grad_()
        b = torch.randn(outs, generator=g).to(dtype).requires_grad_()
        y = upsample_conv2d(x, w, b, size=size, algorithm=algorithm)
        grads = torch.autograd.grad(y, (x, w, b), torch.randn(y.shape, generator=g).to(dtype))
        for t in (y, *grads):
            print(hashlib.sha1(t.detach().float().contiguous().numpy().tobytes()).hexdigest())
            t = t.detach().double()
            print(float(t.square().mean().sqrt()), float(t.sum()))
"""


def _bits(**environment: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", _BITS],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()


def test_threads_and_instruction_sets() -> None:
    """Bits do not depend on threads; other instruction sets agree to round-off."""
    one = _bits(THREADS="1")
    for threads in ("2", "5"):
        assert _bits(THREADS=threads)[::2] == one[::2]
    for capability in ("avx2", "baseline"):
        other = _bits(THREADS="1", SPECTRALX_CPU_CAPABILITY=capability)
        for found, expected in zip(other[1::2], one[1::2], strict=True):
            (norm, total), (norm_one, total_one) = (
                (float(value) for value in line.split()) for line in (found, expected)
            )
            assert norm == pytest.approx(norm_one, rel=1e-3)
            assert total == pytest.approx(total_one, rel=1e-2, abs=norm_one)
