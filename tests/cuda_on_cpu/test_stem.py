"""CUDA kernels of the passes between the stem's convolutions, run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda_on_cpu.build import compiler
from tests.cuda_on_cpu.device import TYPE_CODES, Device
from tests.cuda_on_cpu.test_norm import Pass, norm_library, parts_of, wide_of
from tests.kernels.ladder import relative_error
from tests.tolerances import BACKWARD_FACTOR, FORWARD_FACTOR, ROUND_OFF

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
DTYPES = pytest.mark.parametrize("dtype", list(TYPE_CODES), ids=lambda dtype: str(dtype)[6:])
# Rows and channels: single channels, packs, parts that are not full, more parts than are joined at
# once.
SHAPES = [(2, 3), (63, 5), (700, 16), (130, 72), (17000, 1)]
EPS = 1e-5
GELU = 2


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return norm_library()


def draw(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, skip and the gradient of the output [rows, channels]; weight and bias [channels]."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, skip, grad = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    return [each.to(dtype) for each in (2 * x + 3, skip, grad, 1 + 0.3 * weight, bias)]


def passes(
    library: ctypes.CDLL, given: list[Tensor], *, norm: bool, gelu: bool, over: str = ""
) -> list[Tensor]:
    """The output and the gradient of x; with a norm, its table and the gradients of bias and
    weight. `over`: what the output is written over, "x" or "skip"."""
    device = Device(library)
    x, skip, grad, weight, bias = map(device.put, given)
    assert x is not None
    rows, channels = x.shape
    code, wide = TYPE_CODES[x.dtype], wide_of(x.dtype)
    table, totals = device.empty((4, channels), wide), device.empty((2, channels), wide)
    count = library.spectralx_moment_parts(ctypes.c_int64(rows))
    if norm:
        joined = parts_of(library, device, count, channels, wide)
        device.run("spectralx_channel_moments", code, x, rows, channels, *joined, table)
        device.run("spectralx_norm_table", code, weight, bias, channels, EPS, table)
    arguments = Pass(type=code, rows=rows, channels=channels, activation=GELU if gelu else 0)
    arguments.eps = EPS
    held: dict[str, Tensor | None] = {"x": x, "grad": grad, "skip": skip if gelu else None}
    if norm:
        held |= {"moments": table, "scale": table[2], "bias": table[3]}
    out, dx = (device.empty((rows, channels), x.dtype) for _ in range(2))
    if over:
        out.copy_(given[0] if over == "x" else given[1])
        held[over] = out
    held["out"] = out
    for name, tensor in held.items():
        setattr(arguments, name, None if tensor is None else tensor.data_ptr())
    device.run("spectralx_normalize", ctypes.byref(arguments))
    arguments.x, arguments.out = x.data_ptr(), dx.data_ptr()
    if norm:
        parts = device.empty((count, 2, channels), wide)
        device.run("spectralx_norm_sums", ctypes.byref(arguments), parts, totals)
        arguments.totals = totals.data_ptr()
    if over:  # the gradient of x over that of the output
        dx.copy_(given[2])
        arguments.grad = dx.data_ptr()
    device.run("spectralx_norm_gradient", ctypes.byref(arguments))
    return [out, dx, table, *totals] if norm else [out, dx]


def expected(given: list[Tensor], dtype: torch.dtype, *, norm: bool, gelu: bool) -> list[Tensor]:
    """The same by autograd in `dtype`."""
    x, skip, grad, weight, bias = (each.to(dtype) for each in given)
    wide = wide_of(dtype)
    leaves = [each.clone().requires_grad_() for each in (x, bias.to(wide), weight.to(wide))]
    columns = leaves[0].t()[None]  # [1, channels, rows]
    z = F.batch_norm(columns, None, None, leaves[2], leaves[1], True, 0.0, EPS) if norm else columns
    out = z[0].t() if not gelu else skip + F.gelu(z[0].t())
    grads = torch.autograd.grad(out, leaves if norm else leaves[:1], grad)
    if not norm:
        return [out.detach(), grads[0]]
    variance, mean = torch.var_mean(x.to(wide), 0, correction=0)
    scale = weight.to(wide) * (variance + EPS).rsqrt()
    return [out.detach(), grads[0], torch.stack([mean, variance, scale, bias.to(wide)]), *grads[1:]]


@DTYPES
@pytest.mark.parametrize("gelu", [True, False], ids=["gelu", "none"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("shape", SHAPES)
def test_passes(
    library: ctypes.CDLL, shape: tuple[int, int], norm: bool, gelu: bool, dtype: torch.dtype
) -> None:
    given = draw(shape, dtype)
    exact = expected(given, torch.float64, norm=norm, gelu=gelu)
    plain = expected(given, dtype, norm=norm, gelu=gelu)
    found = passes(library, given, norm=norm, gelu=gelu)
    for place, (ours, truth, own) in enumerate(zip(found, exact, plain, strict=True)):
        factor = FORWARD_FACTOR if place in (0, 2) else BACKWARD_FACTOR
        bound = factor * relative_error(own, truth) + ROUND_OFF[own.dtype]
        assert relative_error(ours, truth) <= bound, place


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("over", ["x", "skip"])
def test_written_over_what_is_read(library: ctypes.CDLL, over: str, norm: bool) -> None:
    given = draw((130, 72), torch.float32)
    apart = passes(library, given, norm=norm, gelu=True)
    for one, other in zip(
        apart, passes(library, given, norm=norm, gelu=True, over=over), strict=True
    ):
        assert torch.equal(one, other)


def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL) -> None:
    given = draw((700, 20), torch.float32)
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        runs.append(passes(library, given, norm=True, gelu=True))
    library.spectralx_shim_order(0)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_nan_stays_in_its_channel(library: ctypes.CDLL) -> None:
    given = draw((130, 8), torch.float32)
    given[0][70, 3] = torch.nan
    out, dx, table, _, dweight = passes(library, given, norm=True, gelu=True)
    wrong = torch.arange(8) == 3
    for found in (out, dx, table[:3], dweight):
        assert torch.equal(found.isnan(), wrong.expand(found.shape))


@DTYPES
@pytest.mark.parametrize(
    ("batch", "pixels", "bands", "channels"),
    [(2, 16, 2, 3), (1, 64, 32, 40), (3, 65, 7, 8), (1, 130, 100, 104), (0, 16, 2, 3)],
)
def test_a_channel_of_ones(
    library: ctypes.CDLL, batch: int, pixels: int, bands: int, channels: int, dtype: torch.dtype
) -> None:
    images = torch.randn(batch, bands, pixels).to(dtype)
    device = Device(library)
    out = device.empty((batch, pixels, channels), dtype)
    device.run(
        "spectralx_with_ones", TYPE_CODES[dtype], device.put(images), batch, pixels, bands,
        channels, out,
    )  # fmt: skip
    assert torch.equal(out[..., :bands], images.transpose(1, 2))
    assert (out[..., bands] == 1).all()
    assert not out[..., bands + 1 :].any()
