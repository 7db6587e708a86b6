"""Linear layers in plain PyTorch: the specification and the ``eager`` backend."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., D] -> [.., O] by weight [O, D] and bias [O]."""
    return F.linear(x, weight, bias)


def patch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [B, C, H, W] -> [B, O, H // k, W // l] by weight [O, C, k, l] and bias [O].

    On a CPU a product of rows of patches: torch 2.13 computes some of these convolutions wrong
    there, in bfloat16 with AMX.
    """
    if x.device.type != "cpu":
        return F.conv2d(x, weight, bias, stride=weight.shape[2:])
    tall, wide = weight.shape[2:]
    height, width = x.shape[2] // tall, x.shape[3] // wide
    whole = x[:, :, : height * tall, : width * wide]
    patches = whole.unflatten(3, (width, wide)).unflatten(2, (height, tall))
    rows = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, h, w, C k l]
    return F.linear(rows, weight.flatten(1), bias).permute(0, 3, 1, 2)
