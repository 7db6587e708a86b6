"""The Are-adapter's operators in plain PyTorch: the specification of this room, backend ``eager``.

SpectralX, "attribute-refined adapter" (arXiv 2508.01731). Notation in README.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def match_argmax(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """For each key [B, N, d] the query [B, M, d] that gives it the largest softmax: [B, N]."""
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    scores = scale * torch.bmm(queries.to(wide), keys.to(wide).transpose(1, 2))  # [B, M, N]
    return (scores - torch.logsumexp(scores, dim=2, keepdim=True)).argmax(dim=1)


def gather_norm(
    tokens: Tensor, match: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_eps: float
) -> Tensor:
    """Layer-normed rows of tokens [B, N, H] at match [B, K]: [B, K, H]."""
    normed = F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, norm_eps)
    image = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
    return normed[image, match.long()]


def gather_norm_mix(
    tokens: Tensor,
    match: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mixing: Tensor,
    norm_eps: float,
) -> Tensor:
    """`gather_norm`, then mixing [T, K] over the gathered rows: [B, T, H]."""
    return torch.matmul(mixing, gather_norm(tokens, match, norm_weight, norm_bias, norm_eps))


def add_weighted_halves(
    tokens: Tensor, spatial_weight: Tensor, spectral_weight: Tensor, scale: Tensor
) -> Tensor:
    """tokens [B, N, D] + scale · [spatial_weight · first half, spectral_weight · second half]."""
    first, second = tokens.chunk(2, dim=-1)
    weighted = [spatial_weight.unsqueeze(-1) * first, spectral_weight.unsqueeze(-1) * second]
    return tokens + scale * torch.cat(weighted, dim=-1)
