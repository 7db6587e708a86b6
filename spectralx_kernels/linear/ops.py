"""Operators of linear layers: declarations, argument checks, public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._checks import (
    check_floating,
    check_layer,
    check_like,
    check_map,
    check_shape,
)
from spectralx_kernels._operator import Operator
from spectralx_kernels.linear import reference

# Below as many multiplications torch's own layer is as fast.
_LEAST = 1 << 22
# From as many rows on MKL, torch's own in float32, is faster on Intel's processors.
_MANY_ROWS = 256

_extension = _backends.extension()
_INTEL = _extension is not None and bool(_extension.is_intel())


def _prefer(args: Sequence[Any], dtype: torch.dtype | None) -> str | None:
    """torch's own layer for what it multiplies as fast: see README.md."""
    x, weight = args[:2]
    if dtype != torch.float32 or x.numel() * weight.shape[0] < _LEAST:
        return "eager"
    return "eager" if _INTEL and x.numel() >= _MANY_ROWS * x.shape[-1] else None


LINEAR = Operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference.linear,
    prefer=_prefer,
    read_for={0: (1,)},  # a frozen weight has no use for x
)
PATCH_CONV2D = Operator(
    "patch_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference.patch_conv2d,
    keep_format=True,
    read_for={0: (1,)},
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``x weight^T + bias``, as ``torch.nn.functional.linear``.

    Parameters
    ----------
    x : [..., D], a floating-point dtype; kept for backward where `weight` has a gradient.
    weight : [O, D] and bias : [O] or None.
    backend : overrides the default backend.

    Returns
    -------
    [..., O] in the dtype of `x`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.
    """
    check_floating("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., width]")
    check_layer("", weight, bias, x.shape[-1])
    check_like("weight", weight, "x", x)
    if bias is not None:
        check_like("bias", bias, "x", x)
    out: Tensor = LINEAR(x, weight, bias, backend=backend)
    return out


def patch_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``torch.nn.functional.conv2d`` of patches side by side: its stride is its kernel.

    On a CPU one product of all patches, cut again in backward. oneDNN's convolutions, which torch
    2.13 takes in bfloat16, give wrong values with AMX, without a word, for some of them: 16
    channels in patches of 4 x 4, 4 to 30 in patches of 16 x 16 where that number is even.

    Parameters
    ----------
    x : [B, C, H, W], a floating-point dtype; kept for backward where `weight` has a gradient.
    weight : [O, C, k, l], patches of k x l pixels, and bias : [O] or None.
    backend : overrides the default backend.

    Returns
    -------
    [B, O, H // k, W // l] in the dtype of `x`, on a CPU channels last in memory. Rows and columns
    of pixels that make up no whole patch are left out.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape; an image smaller than a
        patch.
    """
    check_map("x", x, "channels")
    check_like("weight", weight, "x", x)
    check_shape("weight", weight, ("out", x.shape[1], "height", "width"))
    tall, wide = weight.shape[2:]
    if not 0 < tall <= x.shape[2] or not 0 < wide <= x.shape[3]:
        raise ValueError(
            f"weight: got shape {list(weight.shape)}, expected patches of 1 x 1 to "
            f"{x.shape[2]} x {x.shape[3]} pixels as x has"
        )
    if bias is not None:
        check_like("bias", bias, "x", x)
        check_shape("bias", bias, (weight.shape[0],))
    out: Tensor = PATCH_CONV2D(x, weight, bias, backend=backend)
    return out
