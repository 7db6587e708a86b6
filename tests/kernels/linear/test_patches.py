"""Convolutions of patches side by side, against ``nn.Conv2d`` in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import SavedBytes
from spectralx_kernels import PatchConv2d, patch_conv2d
from spectralx_kernels.linear.ops import PATCH_CONV2D
from tests.kernels import ladder

# channels, outputs, kernel, image: 16 at 4 x 4 and 12 at 16 x 16 are wrong in bfloat16 in oneDNN's
# convolutions on AMX; images that no whole number of patches fills.
SIZES: list[tuple[int, int, Any, tuple[int, int]]] = [
    (16, 12, 4, (8, 12)),
    (12, 24, 16, (32, 48)),
    (5, 3, (2, 3), (7, 11)),
    (4, 6, 1, (3, 2)),
]


def case(channels: int, outs: int, kernel: Any, image: tuple[int, int]) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, outs, kernel, stride=kernel).double()
    return conv, torch.randn(2, channels, *image, dtype=torch.float64)


def run(conv: nn.Conv2d, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Output and the gradients of x, weight and bias."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = conv(x)
    torch.manual_seed(1)
    sought = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, (x, *conv.parameters()), sought)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_the_convolution(size: tuple[Any, ...], dtype: torch.dtype) -> None:
    conv, x = case(*size)
    conv, x = conv.to(dtype), x.to(dtype)  # the truth is of the rounded values
    patches = PatchConv2d(*size[:3], dtype=dtype)
    patches.load_state_dict(conv.state_dict())
    found = run(patches, x)
    expected = run(conv.double(), x.double())
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for one, truth in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert ladder.relative_error(one, truth) < bound
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
def test_autocast(size: tuple[Any, ...]) -> None:
    conv, x = case(*size)
    patches = PatchConv2d(*size[:3])
    patches.load_state_dict(conv.state_dict())
    expected = run(conv, x)
    found = run(patches, x.float(), autocast=True)
    assert found[0].dtype == torch.bfloat16
    for one, truth in zip(found, expected, strict=True):
        assert ladder.relative_error(one, truth) < 2e-2


def test_compiles_without_a_break() -> None:
    _, x = case(*SIZES[2])
    channels, outs, kernel, _ = SIZES[2]
    patches = PatchConv2d(channels, outs, kernel, bias=False)
    assert set(patches.state_dict()) == {"weight"}
    compiled = torch.compile(patches, fullgraph=True, backend="aot_eager")
    expected = F.conv2d(x.float(), patches.weight, stride=patches.stride)
    torch.testing.assert_close(compiled(x.float()), expected)


def arguments(*size: Any, bias: bool = True) -> list[Any]:
    conv, x = case(*size)
    return [x, conv.weight.detach(), conv.bias.detach() if bias and conv.bias is not None else None]


@pytest.mark.parametrize("bias", [True, False])
def test_ladder(bias: bool) -> None:
    args = arguments(3, 2, (2, 3), (5, 6), bias=bias)
    ladder.check_contract(PATCH_CONV2D, args)
    ladder.check_gradients(PATCH_CONV2D, args)
    ladder.check_repeats(PATCH_CONV2D, args)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_accuracy(dtype: torch.dtype) -> None:
    for size in SIZES:
        ladder.check_accuracy(PATCH_CONV2D, arguments(*size), dtype)


def test_keeps_nothing_of_its_own(backend: str) -> None:
    """Patches are cut again in backward; a frozen weight needs of x its shape."""
    x, weight, bias = (arg.float().requires_grad_() for arg in arguments(*SIZES[0]))
    for trained in (True, False) if backend == "cpp" else ():
        with SavedBytes([x, weight, bias]) as saved:
            patch_conv2d(x, weight.requires_grad_(trained), bias, backend=backend)
        assert saved.bytes == 0 if trained else saved.bytes < x.nbytes / 30


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (torch.ones(5, 8, 8), torch.ones(3, 5, 2, 3), None, ValueError, "x: got shape"),
        (torch.ones(2, 4, 8, 8), torch.ones(3, 5, 2, 3), None, ValueError, "weight: got shape"),
        (torch.ones(2, 5, 1, 8), torch.ones(3, 5, 2, 3), None, ValueError, "weight: got shape"),
        (torch.ones(2, 5, 8, 8), torch.ones(3, 5, 0, 3), None, ValueError, "weight: got shape"),
        (torch.ones(2, 5, 8, 8), torch.ones(3, 5, 2, 3).double(), None, TypeError, "weight: got"),
        (torch.ones(2, 5, 8, 8), torch.ones(3, 5, 2, 3), torch.ones(2), ValueError, "bias: got"),
        (torch.ones(2, 5, 8, 8).int(), torch.ones(3, 5, 2, 3), None, TypeError, "x: got dtype"),
    ],
)
def test_refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        patch_conv2d(x, weight, bias)
