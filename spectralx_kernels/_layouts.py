"""How tensors lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is a map [B, C, H, W] with its channels side by side, and not contiguous too."""
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def stand_in(value: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `value` that holds next to nothing.

    Its elements share memory: its strides are 1, 2, 3 and so on in the order of those of `value`,
    so that ``torch.empty_like`` of it is laid out as that of `value`.
    """
    if not value.numel():
        return value
    order = sorted(range(value.dim()), key=lambda dim: (value.stride(dim), -dim))
    strides = [1 + order.index(dim) for dim in range(value.dim())]
    last = sum((size - 1) * step for size, step in zip(value.shape, strides, strict=True))
    return value.new_zeros(last + 1).as_strided(value.shape, strides)
