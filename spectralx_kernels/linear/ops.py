"""The linear layer's operator: declaration, argument checks, public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels._checks import check_floating, check_layer, check_like
from spectralx_kernels._operator import Operator
from spectralx_kernels.linear import reference

# Below as many multiplications torch's own layer is as fast.
_LEAST = 1 << 22


def _prefer(args: Sequence[Any], dtype: torch.dtype | None) -> str | None:
    """torch's own layer for what it multiplies as fast: few values, and all but float32."""
    x, weight = args[:2]
    if dtype == torch.float32 and x.numel() * weight.shape[0] >= _LEAST:
        return None
    return "eager"


LINEAR = Operator(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference.linear,
    prefer=_prefer,
    read_for={0: (1,)},  # a frozen weight has no use for x
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
