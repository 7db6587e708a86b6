"""AoMoA in plain PyTorch: the specification of this room and its ``eager`` backend.

SpectralX, "attribute-oriented mixture of adapters" (arXiv 2508.01731). Notation in README.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE_FLOOR = 0.1  # added to softplus of the noise logits
GATE_FLOOR = 1e-4  # gates at or below it become 0
LOG_EPSILON = -36.04365338911715  # log(2.220446049250313e-16): a token no expert takes


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def noisy_topk_gating(
    clean: Tensor, raw_std: Tensor | None, noise: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """Gates [A, T, E] and load [A, E] from the router's logits [A, T, E]."""
    wide = accumulation_dtype(clean.dtype)
    clean = clean.to(wide)
    if noise is None or raw_std is None:
        std, logits = None, clean
    else:
        std = F.softplus(raw_std.to(wide)) + NOISE_FLOOR
        logits = clean + noise.to(wide) * std

    # A stable sort gives ties to the lowest expert index; torch.topk promises no order.
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    chosen = order[..., :top_k]
    top_gates = torch.softmax(ranked[..., :top_k], dim=-1)
    # Written so that NaN stays: NaN <= GATE_FLOOR is False.
    top_gates = torch.where(top_gates <= GATE_FLOOR, torch.zeros_like(top_gates), top_gates)
    gates = torch.zeros_like(logits).scatter(-1, chosen, top_gates)

    if std is None or top_k == clean.shape[-1]:
        return gates, (gates.detach() != 0).to(wide).sum(dim=-2)
    is_in = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    threshold = torch.where(is_in, ranked[..., top_k : top_k + 1], ranked[..., top_k - 1 : top_k])
    stays = torch.special.ndtr((clean - threshold) / std)
    return gates, stays.sum(dim=-2)


def combine_experts(y: Tensor, gates: Tensor) -> Tensor:
    """log(sum_e g_e exp(y_e)) over the experts with a gate: y [A, T, E, r] -> [A, T, r]."""
    taken = (gates != 0).unsqueeze(-1)
    log_gates = torch.where(gates != 0, gates, torch.ones_like(gates)).log().unsqueeze(-1)
    terms = torch.where(taken, y + log_gates, -torch.inf)
    any_taken = taken.any(dim=-2)
    # A token without experts would make logsumexp's gradient NaN: give it a constant term.
    terms = torch.where(any_taken.unsqueeze(-2), terms, LOG_EPSILON)
    combined = torch.logsumexp(terms, dim=-2)
    return torch.where(any_taken, combined, torch.full_like(combined, LOG_EPSILON))


def aomoa(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scaler: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    down: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    gate: Tensor,
    gate_noise: Tensor,
    noise: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    up: Tensor,
    top_k: int,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, out], gates [A, T, E] and load [A, E] of an adapted linear layer, x [T, in]."""
    wide = accumulation_dtype(x.dtype)
    tokens, width = x.shape
    attributes, rank, _ = gate.shape
    halves = x.view(tokens, attributes, width // attributes).transpose(0, 1)  # [A, T, d]

    u = F.layer_norm(halves, norm1_weight.shape, norm1_weight, norm1_bias, norm_eps)
    z = F.layer_norm(F.linear(u, down), (rank,), norm2_weight, norm2_bias, norm_eps)  # [A, T, r]

    z_wide = z.to(wide)
    clean = torch.bmm(z_wide, gate.to(wide))
    raw_std = None if noise is None else torch.bmm(z_wide, gate_noise.to(wide))
    gates, load = noisy_topk_gating(clean, raw_std, noise, top_k)

    experts, hidden, _ = fc1_weight.shape
    # All experts on all tokens: [A, T, E, h], then [A, T, E, r].
    h = F.linear(z, fc1_weight.reshape(experts * hidden, rank), fc1_bias.reshape(-1))
    h = F.relu(h).unflatten(-1, (experts, hidden))
    y = torch.einsum("ateh,erh->ater", h, fc2_weight) + fc2_bias
    c = combine_experts(y.to(wide), gates).to(x.dtype)

    adapted = F.linear(c, up).transpose(0, 1).flatten(1)  # [T, A * out / A]
    weight = weight.to(x.dtype)  # float32 under autocast, where kernels round as they read it
    return F.linear(x, weight, bias) + scaler * adapted, gates, load


def aomoa_saving(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`aomoa`, and what its kernels keep for backward.

    normed [T, A, r] is norm2's output before its weight and bias; statistics [3, A, T] are mean
    and reciprocal standard deviation of norm1, and the latter of norm2. Both float32 (float64).
    """
    gate, down, norm_eps = arguments[8], arguments[5], arguments[-1]
    wide = accumulation_dtype(x.dtype)
    halves = x.unflatten(1, (gate.shape[0], down.shape[1])).transpose(0, 1).to(wide)
    mean = halves.mean(dim=-1)
    rstd1 = (halves.var(dim=-1, unbiased=False) + norm_eps).rsqrt()
    u = (halves - mean.unsqueeze(-1)) * rstd1.unsqueeze(-1)
    z0 = F.linear(u * arguments[3].to(wide) + arguments[4].to(wide), down.to(wide))
    rstd2 = (z0.var(dim=-1, unbiased=False) + norm_eps).rsqrt()
    normed = (z0 - z0.mean(dim=-1, keepdim=True)) * rstd2.unsqueeze(-1)
    statistics = torch.stack([mean, rstd1, rstd2])
    return *aomoa(x, *arguments), normed.transpose(0, 1), statistics


def balance_loss(gates: Tensor, load: Tensor) -> Tensor:
    """cv²(importance) + cv²(load), summed over attributes; a scalar. Gates [A, T, E]."""
    if gates.shape[-1] == 1:
        return gates.sum() * 0
    squared = [
        values.var(dim=-1) / (values.mean(dim=-1).square() + 1e-10)
        for values in (gates.sum(dim=-2), load)
    ]
    return squared[0].sum() + squared[1].sum()
