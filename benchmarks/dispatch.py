"""AoMoA by gathering and scattering: the algorithm that mixture-of-adapters code usually runs.

The opponent of the ``dispatch`` rows, written the way the field writes it: one attribute after
the other, gates by top-k and scatter, then for every expert the tokens that chose it are listed
(``nonzero``, sort), gathered and split by counts read back to the host, sent through a small
network of their own, put together again, exponentiated, weighted, added up in place
(``index_add``) and brought back by a logarithm. It computes the same function as
`spectralx_kernels.aomoa` as long as no expert's output overflows its exponential.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE_FLOOR = 0.1
GATE_FLOOR = 1e-4
EPSILON = 2.220446049250313e-16


def route(
    z: Tensor, gate: Tensor, gate_noise: Tensor, noise: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """Gates [T, E] and load [E] of one attribute; z [T, r]."""
    clean = z @ gate
    if noise is None:
        logits, std = clean, None
    else:
        std = F.softplus(z @ gate_noise) + NOISE_FLOOR
        logits = clean + noise * std
    experts = gate.shape[1]
    top, order = logits.topk(min(top_k + 1, experts), dim=1)
    weights = torch.softmax(top[:, :top_k], dim=1)
    gates = torch.zeros_like(logits).scatter(1, order[:, :top_k], weights)
    gates = torch.where(gates > GATE_FLOOR, gates, torch.zeros_like(gates))
    if std is None or top_k == experts:
        return gates, (gates > 0).sum(0).to(gates.dtype)
    threshold_in, threshold_out = top[:, top_k : top_k + 1], top[:, top_k - 1 : top_k]
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    load = torch.where(
        logits > threshold_in,
        normal.cdf((clean - threshold_in) / std),
        normal.cdf((clean - threshold_out) / std),
    )
    return gates, load.sum(0)


def mix(
    z: Tensor,
    gates: Tensor,
    fc1: Sequence[tuple[Tensor, Tensor]],
    fc2: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """log(sum over experts of gate * exp(expert(z))), expert by expert; z [T, r] -> [T, r]."""
    taken = torch.nonzero(gates)  # (token, expert) pairs
    _, by_expert = taken[:, 1].sort(stable=True)
    token = taken[by_expert, 0]
    counts = (gates > 0).sum(0).tolist()
    weight = gates[token, taken[by_expert, 1]].unsqueeze(1)

    outputs = [
        F.linear(F.relu(F.linear(part, *first)), *second)
        for part, first, second in zip(z[token].split(counts), fc1, fc2, strict=True)
    ]
    stitched = torch.cat(outputs).to(weight.dtype).exp() * weight
    total = torch.zeros(z.shape, dtype=stitched.dtype, device=z.device)
    total = total.index_add(0, token, stitched)
    total = torch.where(total == 0, torch.full_like(total, EPSILON), total)
    return total.log().to(z.dtype)


def aomoa(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scaler: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    down: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    gate: Tensor,
    gate_noise: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    up: Tensor,
    top_k: int,
    noise: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Output [..., out] of an adapted linear layer; arguments as of `spectralx_kernels.aomoa`."""
    attributes, rank, _ = gate.shape
    rows = x.reshape(-1, x.shape[-1])
    # One network an expert, as if its weights were its own parameters.
    fc1 = list(zip(fc1_weight.unbind(), fc1_bias.unbind(), strict=True))
    fc2 = list(zip(fc2_weight.unbind(), fc2_bias.unbind(), strict=True))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    adapted = []
    for attribute, part in enumerate(rows.chunk(attributes, dim=1)):
        u = F.layer_norm(part, norm1_weight.shape, norm1_weight, norm1_bias, norm_eps)
        z = F.layer_norm(F.linear(u, down), (rank,), norm2_weight, norm2_bias, norm_eps)
        gates, _ = route(
            z.to(wide),
            gate[attribute].to(wide),
            gate_noise[attribute].to(wide),
            None if noise is None else noise[attribute].to(wide),
            top_k,
        )
        adapted.append(F.linear(mix(z, gates, fc1, fc2), up))
    out = F.linear(rows, weight, bias) + scaler * torch.cat(adapted, dim=1)
    return out.reshape(*x.shape[:-1], weight.shape[0])
