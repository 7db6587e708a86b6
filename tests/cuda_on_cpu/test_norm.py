"""CUDA kernels of batch statistics, batch norm and ReLU, run on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels.upsample import reference
from tests.cuda_on_cpu.build import ROOT, compile_cuda, compiler, load
from tests.cuda_on_cpu.device import TYPE_CODES, Device
from tests.cuda_on_cpu.structure import structure
from tests.kernels.ladder import relative_error
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
HEADER = ROOT / "csrc" / "cuda" / "common" / "norm.h"
Pass = structure(HEADER, "SpectralxNorm")
DTYPES = pytest.mark.parametrize("dtype", list(TYPE_CODES), ids=lambda dtype: str(dtype)[6:])
# Rows and channels: none, one, parts that are not full, packs and single channels, wide, and more
# parts than are joined at once.
SHAPES = [(0, 3), (1, 8), (63, 5), (700, 16), (130, 272), (17000, 1)]
EPS = 1e-3


def norm_library() -> ctypes.CDLL:
    """Batch norms, and the stem's passes that only test_stem.py needs: compiled once for both."""
    sources = [HEADER.with_suffix(".cu"), HEADER.parents[1] / "hypert" / "maps.cu"]
    loaded = load(compile_cuda(sources, "-O1", "-shared"))
    for name in ("spectralx_moment_parts", "spectralx_moment_groups"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return norm_library()


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and the gradient of the output [rows, channels]; weight and bias [channels]."""
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    wide = wide_of(dtype)
    return (2 * x + 3).to(dtype), grad.to(dtype), weight.to(wide), bias.to(wide)


def parts_of(library: ctypes.CDLL, device: Device, count: int, channels: int, wide: Any) -> Any:
    every = count + library.spectralx_moment_groups(ctypes.c_int64(count))
    return device.empty((every, 2, channels), wide), device.empty((every,), wide)


def moments_of(library: ctypes.CDLL, x: Tensor) -> Tensor:
    device, wide = Device(library), wide_of(x.dtype)
    rows, channels = x.shape
    count = library.spectralx_moment_parts(ctypes.c_int64(rows))
    moments = device.empty((2, channels), wide)
    device.run(
        "spectralx_channel_moments", TYPE_CODES[x.dtype], device.put(x), rows, channels,
        *parts_of(library, device, count, channels, wide), moments,
    )  # fmt: skip
    return moments


def run(
    library: ctypes.CDLL, given: tuple[Tensor, ...], moments: Tensor, relu: bool, batch: bool
) -> list[Tensor]:
    """Output, gradient of x, and the sums of dz and of dz times x as normalised."""
    device = Device(library)
    x, grad, weight, bias = (device.put(each) for each in given)
    assert x is not None
    rows, channels = x.shape
    wide = wide_of(x.dtype)
    out, dx = device.empty(x.shape, x.dtype), device.empty(x.shape, x.dtype)
    count = library.spectralx_moment_parts(ctypes.c_int64(rows))
    parts, totals = device.empty((count, 2, channels), wide), device.empty((2, channels), wide)
    arguments = Pass(type=TYPE_CODES[x.dtype], rows=rows, channels=channels, activation=int(relu))
    arguments.eps = EPS
    kept = device.put(moments)
    for name, tensor in (
        ("x", x), ("grad", grad), ("moments", kept), ("weight", weight), ("bias", bias)
    ):  # fmt: skip
        if tensor is not None and tensor.numel():
            setattr(arguments, name, tensor.data_ptr())
    arguments.out = out.data_ptr() if rows else None
    device.run("spectralx_normalize", ctypes.byref(arguments))
    device.run("spectralx_norm_sums", ctypes.byref(arguments), parts, totals)
    arguments.out = dx.data_ptr() if rows else None
    arguments.totals = totals.data_ptr() if batch else None
    device.run("spectralx_norm_gradient", ctypes.byref(arguments))
    return [out, dx, *totals]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(library: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = draw(shape, dtype)[0]
    as_map = x.t().reshape(1, shape[1], -1, 1)
    exact = reference.channel_moments(as_map.double())
    plain = reference.channel_moments(as_map)
    bound = FORWARD_FACTOR * relative_error(plain, exact) + ROUND_OFF[wide_of(dtype)]
    assert relative_error(moments_of(library, x), exact) <= bound


def test_a_mean_far_from_zero(library: ctypes.CDLL) -> None:
    mean = 3e3
    x = draw((700, 16), torch.float32)[0] + mean
    exact = reference.channel_moments(x.t().reshape(1, 16, -1, 1).double())
    error = moments_of(library, x).double() / exact - 1
    assert error.abs().max() <= mean * ROUND_OFF[torch.float32]


@DTYPES
@pytest.mark.parametrize("batch", [True, False], ids=["own", "fixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(
    library: ctypes.CDLL, shape: tuple[int, int], batch: bool, dtype: torch.dtype
) -> None:
    """With and without ReLU, weight and bias, against autograd through the reference."""
    given = draw(shape, dtype)
    channels = shape[1]
    if batch and shape[0] < 2:
        return  # refused at the door
    for relu, affine in ((True, True), (False, False)):
        x, grad, weight, bias = given
        moments = reference.channel_moments(x.t().reshape(1, channels, -1, 1))
        moments = moments if batch else torch.stack([bias, weight.square() + 0.5])
        results = []
        for wide in (torch.float64, wide_of(dtype)):
            # Where there is none, ones and zeros, whose gradients are the sums.
            leaves = [
                x.to(wide if wide == torch.float64 else dtype).clone(),
                weight.to(wide) if affine else torch.ones(channels, dtype=wide),
                bias.to(wide) if affine else torch.zeros(channels, dtype=wide),
            ]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            as_map = leaves[0].t().reshape(1, channels, -1, 1)
            by = moments.to(wide), leaves[1], leaves[2]
            out = reference.batch_norm_relu(as_map, *by, EPS, relu, batch)
            out = out.reshape(channels, -1).t()
            grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
            results.append([out.detach(), grads[0], grads[2], grads[1]])
        used = given if affine else (*given[:2], None, None)
        found = run(library, used, moments, relu, batch)  # type: ignore[arg-type]
        for place, (ours, exact, plain) in enumerate(zip(found, *results, strict=True)):
            factor = FORWARD_FACTOR if place == 0 else BACKWARD_FACTOR
            kind = dtype if place < 2 else wide_of(dtype)
            bound = factor * relative_error(plain, exact) + ROUND_OFF[kind]
            assert relative_error(ours, exact) <= bound, (place, relu)


def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL) -> None:
    given = draw((700, 20), torch.float32)
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        moments = moments_of(library, given[0])
        runs.append([moments, *run(library, given, moments, True, True)])
    library.spectralx_shim_order(0)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_nan_stays_in_its_channel(library: ctypes.CDLL) -> None:
    given = draw((130, 8), torch.float32)
    given[0][70, 3] = torch.nan
    moments = moments_of(library, given[0])
    wrong = torch.arange(8) == 3
    assert torch.equal(moments.isnan(), wrong.expand(2, 8))
    out, dx, _, dots = run(library, given, moments, True, True)
    for found in (out, dx, dots):
        assert torch.equal(found.isnan(), wrong.expand(found.shape))
