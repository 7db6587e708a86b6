"""CUDA kernels between the products of an upsampled convolution, run on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

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
DTYPES = list(TYPE_CODES)
FOLDER = ROOT / "csrc" / "cuda" / "upsample"
NORM = ROOT / "csrc" / "cuda" / "common" / "norm.cu"
Pass = structure(FOLDER / "kernels.h", "SpectralxConvolution")


class Case(NamedTuple):
    batch: int
    ins: int
    outs: int
    small: tuple[int, int]
    large: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    align_corners: bool = False


CASES = {
    "paper": Case(1, 4, 16, (4, 5), (16, 20)),
    "corners": Case(2, 3, 8, (3, 5), (11, 13), align_corners=True),
    "odd": Case(2, 3, 5, (5, 3), (12, 7)),
    "more packs than a block": Case(1, 2, 264, (2, 2), (3, 5)),
    "wider than a block": Case(1, 2, 1, (2, 40), (3, 150)),
    "wide packs": Case(1, 2, 8, (2, 40), (3, 150), align_corners=True),
    "down": Case(1, 3, 8, (19, 31), (4, 7)),
    "up and down": Case(1, 3, 3, (3, 30), (13, 11), align_corners=True),
    "same": Case(1, 3, 8, (5, 6), (5, 6)),
    "same rows": Case(1, 3, 4, (5, 3), (5, 9)),
    "1x1": Case(2, 3, 8, (5, 4), (9, 13), (1, 1), (0, 0)),
    "1x1 in padding": Case(1, 3, 2, (2, 4), (5, 7), (1, 1), (2, 1)),
    "5x5": Case(1, 3, 8, (5, 4), (9, 13), (5, 5), (2, 2)),
    "no padding": Case(1, 3, 4, (5, 4), (9, 13), (5, 3), (0, 0), True),
    "much padding": Case(1, 3, 4, (2, 3), (5, 4), (3, 5), (4, 3)),
    "one pixel": Case(2, 3, 3, (1, 1), (6, 5)),
    "to one pixel": Case(1, 3, 8, (4, 3), (1, 1), align_corners=True),
    "one of each": Case(1, 1, 1, (1, 1), (1, 1)),
    "1 to many": Case(1, 2, 1, (1, 2), (70, 60), align_corners=True),
    "empty": Case(0, 3, 8, (2, 2), (5, 4)),
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = load(compile_cuda([FOLDER / "convolution.cu", NORM], "-O1", "-shared"))
    loaded.spectralx_convolution_places.restype = ctypes.c_int64
    for name in ("channel_parts", "tap_sum_parts", "moment_groups"):
        getattr(loaded, f"spectralx_{name}").restype = ctypes.c_int64
    return loaded


def outputs_of(case: Case) -> tuple[int, int]:
    rows, columns = (case.large[i] + 2 * case.padding[i] - case.kernel[i] + 1 for i in range(2))
    return rows, columns


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, addend."""
    generator = torch.Generator().manual_seed(case.outs)
    shapes = (
        (case.batch, case.ins, *case.small), (case.outs, case.ins, *case.kernel), (case.outs,),
        (case.batch, case.outs, *outputs_of(case)),
    )  # fmt: skip
    x, weight, bias, addend = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return x, weight, bias, addend


def arguments_of(library: ctypes.CDLL, device: Device, case: Case, dtype: torch.dtype) -> Any:
    """What forward and backward are both given."""
    arguments = Pass(
        type=TYPE_CODES[dtype], batch=case.batch, channels=case.outs, height=case.small[0],
        width=case.small[1], up_height=case.large[0], up_width=case.large[1],
        kernel_rows=case.kernel[0], kernel_columns=case.kernel[1], row_padding=case.padding[0],
        column_padding=case.padding[1], align_corners=int(case.align_corners),
    )  # fmt: skip
    scratch = library.spectralx_convolution_places(ctypes.byref(arguments))
    bind(arguments, "places", device.empty((-(-scratch // 4),), torch.float32))
    return arguments


def bind(arguments: Any, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.numel():
        setattr(arguments, name, tensor.data_ptr())


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def products(x: Tensor, weight: Tensor) -> Tensor:
    """Z [B, h, w, ky, kx, O], rounded once."""
    wide = wide_of(x.dtype)
    z = torch.einsum("bchw,ockl->bhwklo", x.to(wide), weight.to(wide))
    return z.to(x.dtype).contiguous()


def forward(
    library: ctypes.CDLL, case: Case, z: Tensor, bias: Tensor | None, addend: Tensor | None,
    relu: bool, last: bool, moments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum of Z [B, O, H', W'] in channels-last memory or not; addend as it lies.

    `moments` [2, O] is filled with those of the sum.
    """
    device, dtype = Device(library), z.dtype
    arguments = arguments_of(library, device, case, dtype)
    rows, columns = outputs_of(case)
    shape = (
        (case.batch, rows, columns, case.outs) if last else (case.batch, case.outs, rows, columns)
    )
    out = device.empty(shape, dtype)
    out = out.permute(0, 3, 1, 2) if last else out
    kept = [device.put(z), device.put(None if bias is None else bias.to(wide_of(dtype)))]
    if addend is not None and addend.is_contiguous():
        addend = device.put(addend)
    elif addend is not None and addend.is_contiguous(memory_format=torch.channels_last):
        flat = device.put(addend.permute(0, 2, 3, 1))
        assert flat is not None
        addend = flat.permute(0, 3, 1, 2)
    for name, tensor in (("z", kept[0]), ("bias", kept[1]), ("addend", addend), ("out", out)):
        bind(arguments, name, tensor)
    for name, tensor in (("addend", addend), ("out", out)):
        if tensor is not None:
            for axis, stride in zip(
                ("image", "channel", "row", "column"), tensor.stride(), strict=True
            ):
                setattr(arguments, f"{name}_{axis}", stride)
    arguments.relu = int(relu)
    if moments is None:
        device.run("spectralx_tap_sum", ctypes.byref(arguments))
        return out
    count = library.spectralx_tap_sum_parts(ctypes.byref(arguments))
    every = count + library.spectralx_moment_groups(ctypes.c_int64(count))
    parts = device.empty((every, 2, case.outs), moments.dtype)
    counts = device.empty((every,), moments.dtype)
    bind(arguments, "parts", parts)
    bind(arguments, "counts", counts)
    device.run("spectralx_tap_sum", ctypes.byref(arguments))
    given = (parts, counts, count, case.outs, moments)
    device.run("spectralx_join_moments", TYPE_CODES[dtype], *given)
    return out


def backward(library: ctypes.CDLL, case: Case, grad: Tensor) -> Tensor:
    """The gradient of Z, of grad [B, O, H', W']."""
    device = Device(library)
    arguments = arguments_of(library, device, case, grad.dtype)
    dz = device.empty((case.batch, *case.small, *case.kernel, case.outs), grad.dtype)
    kept = device.put(grad.permute(0, 2, 3, 1).contiguous())
    bind(arguments, "grad", kept)
    bind(arguments, "dz", dz)
    device.run("spectralx_tap_gather", ctypes.byref(arguments))
    return dz


def spread(case: Case, z: Tensor) -> Tensor:
    """The sum of Z by the reference's matrices: linear, so that autograd transposes it."""
    like = z.new_empty((), dtype=wide_of(z.dtype))
    rows, columns = (
        reference.tap_matrices(
            case.small[i], case.large[i], case.kernel[i], case.padding[i], case.align_corners, like
        )
        for i in range(2)
    )
    return torch.einsum("bhwklo,kyh,lxw->boyx", z.to(like.dtype), rows, columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_forward_against_the_reference(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    x, weight, bias, addend = draw(case, dtype)
    z = products(x, weight)
    options = ([*case.large], [*case.padding], case.align_corners)
    last = torch.channels_last
    for given, more, relu, channels_last in (
        (None, None, False, True),
        (bias, addend.contiguous(memory_format=last), True, True),
        (bias, addend, True, False),
        (None, addend, False, True),
    ):
        found = forward(library, case, z, given, more, relu, channels_last)
        exact, plain = (
            reference.upsample_conv2d(
                x.to(type_), weight.to(type_), None if given is None else given.to(type_),
                None if more is None else more.to(type_), *options, by_taps, relu,
            )
            for type_, by_taps in ((torch.float64, False), (dtype, True))
        )  # fmt: skip
        bound = FORWARD_FACTOR * relative_error(plain, exact) + ROUND_OFF[dtype]
        assert found.shape == exact.shape
        assert relative_error(found, exact) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_moments_of_the_sum(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    """Of what is stored, and the sum is the same with them, in both layouts."""
    case = CASES[name]
    x, weight, bias, addend = draw(case, dtype)
    z = products(x, weight)
    for last in (True, False):
        plain = forward(library, case, z, bias, addend, False, last)
        moments = plain.new_full((2, case.outs), torch.nan, dtype=wide_of(dtype))
        found = forward(library, case, z, bias, addend, False, last, moments)
        assert torch.equal(found, plain)
        exact = reference.channel_moments(found.double())
        own = relative_error(reference.channel_moments(found), exact)
        assert relative_error(moments, exact) <= FORWARD_FACTOR * own + ROUND_OFF[moments.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_backward_against_autograd(library: ctypes.CDLL, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    _, _, _, grad = draw(case, dtype)
    shape = (case.batch, *case.small, *case.kernel, case.outs)
    found = backward(library, case, grad)
    gradients: list[Tensor] = []
    for type_ in (torch.float64, dtype):
        leaf = torch.zeros(shape, dtype=type_, requires_grad=True)
        out = spread(case, leaf)
        gradients += torch.autograd.grad(out, leaf, grad.to(out.dtype))
    exact, plain = gradients
    bound = BACKWARD_FACTOR * relative_error(plain, exact) + ROUND_OFF[dtype]
    assert relative_error(found, exact) <= bound


@pytest.mark.parametrize("name", ["corners", "odd", "down", "5x5", "no padding"])
def test_gradients_by_the_products(library: ctypes.CDLL, name: str) -> None:
    """With the two products around it: the gradients of x and weight themselves."""
    case = CASES[name]
    x, weight, _, grad = draw(case, torch.float64)
    leaves = x.requires_grad_(), weight.requires_grad_()
    out = reference.upsample_conv2d_by_map(
        x, weight, None, [*case.large], [*case.padding], case.align_corners
    )
    x_grad, weight_grad = torch.autograd.grad(out, leaves, grad)
    dz = backward(library, case, grad)
    found_x = torch.einsum("bhwklo,ockl->bchw", dz, weight.detach())
    found_weight = torch.einsum("bhwklo,bchw->ockl", dz, x.detach())
    assert relative_error(found_x, x_grad) <= ROUND_OFF[torch.float64]
    assert relative_error(found_weight, weight_grad) <= ROUND_OFF[torch.float64]


def sums_of(library: ctypes.CDLL, x: Tensor) -> Tensor:
    device, wide = Device(library), wide_of(x.dtype)
    rows, channels = x.shape
    parts = device.empty((library.spectralx_channel_parts(ctypes.c_int64(rows)), channels), wide)
    total = device.empty((channels,), wide)
    device.run(
        "spectralx_channel_sums", TYPE_CODES[x.dtype], device.put(x), rows, channels, parts, total
    )
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [(0, 3), (1, 8), (63, 5), (700, 16), (130, 272), (17000, 1)])
def test_channel_sums(library: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.to(dtype)
    exact = x.double().sum(dim=0)
    plain = x.to(wide_of(dtype)).sum(dim=0)
    bound = FORWARD_FACTOR * relative_error(plain, exact) + ROUND_OFF[wide_of(dtype)]
    assert relative_error(sums_of(library, x), exact) <= bound


@pytest.mark.parametrize("name", ["paper", "odd", "down"])
def test_any_order_of_threads_gives_the_same_bits(library: ctypes.CDLL, name: str) -> None:
    case = CASES[name]
    x, weight, bias, addend = draw(case, torch.float32)
    z, pixels = products(x, weight), addend.permute(0, 2, 3, 1).reshape(-1, case.outs)
    runs = []
    for order in (0, 1):
        library.spectralx_shim_order(order)
        out = forward(library, case, z, bias, addend, True, True)
        runs.append((out, backward(library, case, addend), sums_of(library, pixels)))
    library.spectralx_shim_order(0)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_both_layouts_give_the_same_bits(library: ctypes.CDLL) -> None:
    case = CASES["paper"]
    x, weight, bias, addend = draw(case, torch.float32)
    z = products(x, weight)
    outs = [forward(library, case, z, bias, addend, True, last) for last in (False, True)]
    assert torch.equal(*outs)


def test_an_addend_that_is_a_window(library: ctypes.CDLL) -> None:
    """Channels side by side, but on no multiple of 16 bytes."""
    case = CASES["paper"]
    x, weight, bias, addend = draw(case, torch.float32)
    z, rows, columns = products(x, weight), *outputs_of(case)
    window = torch.empty(case.batch, rows, columns, case.outs + 3)[..., 1:-2].permute(0, 3, 1, 2)
    window.copy_(addend)
    outs = [forward(library, case, z, bias, each, True, True) for each in (addend, window)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["paper", "down", "same", "much padding"])
def test_what_is_not_finite_stays_in_its_surroundings(
    library: ctypes.CDLL, name: str, value: float
) -> None:
    case = CASES[name]
    z = torch.zeros(case.batch, *case.small, *case.kernel, case.outs)
    z[0, 1, 1, 0, 1, 0] = value
    touched = spread(case, z.isfinite().logical_not().double()) != 0
    for relu in (False, True):
        found = forward(library, case, z, None, None, relu, True)
        kept = touched if value != -torch.inf or not relu else torch.zeros_like(touched)
        assert torch.equal(~found.isfinite(), kept)
        assert value == value or found[touched].isnan().all()
    grad = torch.zeros(case.batch, case.outs, *outputs_of(case))
    grad[0, 0, 1, 1] = value
    leaf = torch.zeros(z.shape, dtype=torch.float64, requires_grad=True)
    reached = torch.autograd.grad(spread(case, leaf), leaf, (~grad.isfinite()).double())[0] != 0
    dz = backward(library, case, grad)
    # A pixel's gradient, the sum over its taps, is what it is in any case.
    pixels = (~dz.isfinite()).any(dim=4).any(dim=3)
    assert torch.equal(pixels, reached.any(dim=4).any(dim=3))
