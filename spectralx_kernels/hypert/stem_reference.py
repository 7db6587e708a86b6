"""The stem's operator in plain PyTorch: its specification and its ``eager`` backend.

SpectralX, "hyper tokenizer" (arXiv 2508.01731). Notation in README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x normed by its own statistics, and their table [4, C]; x itself, [4, 0], without weights."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight is None or bias is None:
        return x, x.new_empty(4, 0, dtype=wide)
    # Contiguous: torch's backward reads a strided weight as if it were, on channels_last maps.
    weight, bias = weight.to(wide).contiguous(), bias.to(wide).contiguous()
    if x.numel() == 0:  # the mean of nothing
        return x, x.new_full((4, x.shape[1]), torch.nan, dtype=wide)
    normed, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    table = torch.stack([mean, rstd**-2 - eps, weight * rstd, bias])
    return normed, table.detach()


def _convolutions(
    x: Tensor,
    lift_weight: Tensor | None,
    lift_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    half_weight: Tensor,
    half_bias: Tensor,
    half_norm_weight: Tensor | None,
    half_norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The three outputs, and what the 3x3 and the halving convolution gave."""
    lifted = x if lift_weight is None else F.conv2d(x, lift_weight, lift_bias)
    convolved = F.conv2d(lifted, weight, bias, padding=1)
    normed, table = _batch_norm(convolved, norm_weight, norm_bias, eps)
    halved = F.conv2d(lifted + F.gelu(normed), half_weight, half_bias, stride=2)
    out, half_table = _batch_norm(halved, half_norm_weight, half_norm_bias, eps)
    return out, table, half_table, convolved, halved


def residual_halving(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    """BN(conv2x2/2(a + GELU(BN(conv3x3 a)))), a = x or conv1x1(x); and a table for each BN.

    A table [4, C] holds mean, variance, scale and shift.
    """
    return _convolutions(*args[:-1])[:3]  # type: ignore[arg-type]


def residual_halving_saving(*args: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same with what kernels keep for backward, channels-last; [0] where they do not."""
    out, table, half_table, convolved, halved = _convolutions(*args[:-1])  # type: ignore[arg-type]
    last, keep = torch.channels_last, bool(args[-1])
    return (
        out.contiguous(memory_format=last),
        table,
        half_table,
        convolved.contiguous(memory_format=last) if keep else out.new_empty(0),
        halved.contiguous(memory_format=last) if keep and half_table.shape[1] else out.new_empty(0),
    )
