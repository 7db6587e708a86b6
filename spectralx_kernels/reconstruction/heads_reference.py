"""The prediction heads of both families in plain PyTorch: the specification and ``eager`` backend.

Notation in README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LAST = torch.channels_last


def activated(x: Tensor, name: str) -> Tensor:
    """ "none", "gelu" (exact), "relu" or "leaky_relu" (slope 0.01) of `x`."""
    if name == "gelu":
        return F.gelu(x)
    if name == "relu":
        return F.relu(x)
    if name == "leaky_relu":
        return F.leaky_relu(x)
    assert name == "none"
    return x


def _normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, before: str, after: str
) -> Tensor:
    x = activated(x, before)
    if weight is not None:
        # A map's channels are its last axis here, side by side.
        normed = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)
        x = normed.permute(0, 3, 1, 2)
    return activated(x, after)


def channel_norm(
    x: Tensor,
    addend: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    before: str,
    after: str,
    scale: float,
) -> Tensor:
    """after(norm(before(x))) + scale * addend; maps [B, C, H, W]."""
    out = _normed(x, weight, bias, eps, before, after)
    if addend is not None:
        out = out + scale * addend
    return out.contiguous(memory_format=_LAST)


def channel_norm_conv2d(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    before: str,
    after: str,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """The convolution of after(norm(before(x))), or the transposed one."""
    normed = _normed(x, norm_weight, norm_bias, eps, before, after)
    convolve = F.conv_transpose2d if transposed else F.conv2d
    return convolve(normed, weight, bias, stride, padding).contiguous(memory_format=_LAST)


def gelu_grouped_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of the grouped 3x3 convolution of GELU(x): [B, 2 C, H, W] -> [B, C, H, W]."""
    out = F.conv2d(F.gelu(x), weight, bias, padding=1, groups=weight.shape[0])
    return F.gelu(out).contiguous(memory_format=_LAST)


def pixel_head(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    grouped: Tensor,
    grouped_bias: Tensor,
    mix: Tensor,
    mix_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    keep: bool,
) -> Tensor:
    """x [B, D, h, w] -> [B, C, n k h, n k w], k and n the two transposed convolutions' strides.

    `keep` is for kernels: autograd has its own ways.
    """
    x = F.gelu(F.conv_transpose2d(x, expand, expand_bias, stride=expand.shape[2]))
    x = F.gelu(F.conv2d(x, grouped, grouped_bias, padding=1, groups=grouped.shape[0]))
    x = F.gelu(F.conv2d(x, mix, mix_bias))
    out = F.conv_transpose2d(x, project, project_bias, stride=project.shape[2])
    return out.contiguous(memory_format=_LAST)


def pixel_head_saving(
    x: Tensor, expand: Tensor, expand_bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The same with what kernels keep for backward, [0] where they do not.

    That is the first convolution's map by pixels of x: [B, h, w, k k E].
    """
    out = pixel_head(x, expand, expand_bias, *rest)
    if not rest[-1]:
        return out, x.new_empty(0)
    side = expand.shape[2]
    wide = F.conv_transpose2d(x, expand, expand_bias, stride=side)
    parts = wide.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, E, h, k, w, k]
    return out, parts.permute(0, 2, 4, 3, 5, 1).flatten(3).contiguous()
