"""HyperT's operators in plain PyTorch: the specification of this room and its ``eager`` backend.

SpectralX, "hyper tokenizer" (arXiv 2508.01731). Notation in README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(
    qkv: Tensor, padding: Tensor | None, num_heads: int, window: list[int]
) -> Tensor:
    """Attention within windows of a map: qkv [B, H, W, 3D] -> [B, H, W, D]."""
    batch, height, width, channels = qkv.shape
    rows, columns = window
    down, across = (height + rows - 1) // rows, (width + columns - 1) // columns
    below, right = down * rows - height, across * columns - width
    if padding is not None:
        qkv = torch.cat([qkv, padding.expand(batch, height, right, channels)], dim=2)
        qkv = torch.cat([qkv, padding.expand(batch, below, across * columns, channels)], dim=1)
    dim = channels // 3 // num_heads
    q, k, v = (
        qkv.reshape(batch, down, rows, across, columns, 3, num_heads, dim)
        .permute(5, 0, 1, 3, 6, 2, 4, 7)
        .reshape(3, batch * down * across, num_heads, rows * columns, dim)
        .unbind(0)
    )
    out = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(dim)) v
    out = out.reshape(batch, down, across, num_heads, rows, columns, dim)
    out = out.permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, down * rows, across * columns, channels // 3)
    return out[:, :height, :width]


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_eps: float,
) -> Tensor:
    """A linear layer of layer-normed rows x [.., D]: [.., O]."""
    return F.linear(
        F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, norm_eps), weight, bias
    )


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor) -> Tensor:
    """A linear layer of x [.., D], added to addend [.., O]."""
    return addend + F.linear(x, weight, bias)


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: bool,
    norm_eps: float,
) -> Tensor:
    """Norm, linear, GELU, linear of rows x [.., D], added to x where `residual`."""
    hidden = F.gelu(norm_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, norm_eps))
    out = F.linear(hidden, fc2_weight, fc2_bias)
    return x + out if residual else out


def attribute_match(
    features: Tensor,
    queries: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    norm_eps: float,
) -> Tensor:
    """What each query [M, d] finds in normed features [B, N, F]: [B, M, d]."""
    normed = F.layer_norm(features, norm_weight.shape, norm_weight, norm_bias, norm_eps)
    k, v = F.linear(normed, kv_weight).chunk(2, dim=-1)  # [B, N, d] each
    q = queries.expand(features.shape[0], *queries.shape)
    return F.scaled_dot_product_attention(q, k, v)
