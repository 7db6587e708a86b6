"""The operators of this room: declarations, argument checks, public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels._checks import (
    check_device,
    check_floating,
    check_like,
    check_range,
    check_shape,
    check_tensors,
)
from spectralx_kernels._operator import Operator, Saving
from spectralx_kernels.aomoa import reference

GATING = Operator(
    "noisy_topk_gating",
    "(Tensor clean, Tensor? raw_std, Tensor? noise, int top_k) -> (Tensor gates, Tensor load)",
    reference.noisy_topk_gating,
)


def _aomoa_fake(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    attributes, rank, experts = others[7].shape  # gate
    tokens, wide = x.shape[0], reference.accumulation_dtype(x.dtype)
    return (
        x.new_empty(tokens, weight.shape[0]),
        x.new_empty(attributes, tokens, experts, dtype=wide),
        x.new_empty(attributes, experts, dtype=wide),
        x.new_empty(tokens, attributes, rank, dtype=wide),
        x.new_empty(3, attributes, tokens, dtype=wide),
    )


# Tokens from which on a GPU takes longer than the host takes to start Triton's kernels.
_MANY_TOKENS = 2048
_MEASURED_RANK = 128  # up to which an H100 has shown Triton to be the faster; README.md


def _prefer(args: Sequence[Any], dtype: torch.dtype | None) -> str | None:
    """Triton where the GPU is what takes the time: measured on an H100, see README.md."""
    x, gate = args[0], args[9]
    many = x.is_cuda and x.shape[0] >= _MANY_TOKENS and gate.shape[1] <= _MEASURED_RANK
    return "triton" if many and dtype in (torch.bfloat16, torch.float16) else None


AOMOA = Operator(
    "aomoa",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor scaler, Tensor norm1_weight, "
    "Tensor norm1_bias, Tensor down, Tensor norm2_weight, Tensor norm2_bias, Tensor gate, "
    "Tensor gate_noise, Tensor? noise, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
    "Tensor fc2_bias, Tensor up, int top_k, float norm_eps) "
    "-> (Tensor out, Tensor gates, Tensor load, Tensor normed, Tensor statistics)",
    reference.aomoa,
    saving=Saving(reference.aomoa_saving, hidden=2, kept=(1, 3, 4)),
    fake=_aomoa_fake,
    prefer=_prefer,
    uncast=(1,),  # the frozen weight, which is most of what the layer reads
)
AOMOA.add_triton("spectralx_kernels.aomoa.triton")


def noisy_topk_gating(
    clean: Tensor,
    raw_std: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    top_k: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Noisy top-k gating of a mixture of experts.

    With noise (training), logits are ``clean + noise * (softplus(raw_std) + 0.1)``; without it
    (evaluation) they are `clean`. Gates are the softmax over the `top_k` largest logits, ties to
    the lowest expert index; a gate of 1e-4 or less becomes 0 without renormalising.

    Parameters
    ----------
    clean : [A, T, E], logits of A attributes, T tokens, E experts; a floating-point dtype.
    raw_std : [A, T, E], logits of the noise's standard deviation; needed with `noise`.
    noise : [A, T, E], standard normal draws, or None in evaluation.
    top_k : experts a token takes, 1 to E.
    backend : overrides the default backend.

    Returns
    -------
    gates : [A, T, E], float32 (float64 for float64).
    load : [A, E], same dtype. With noise and ``top_k < E`` the expected number of tokens of each
        expert if its own noise were redrawn, differentiable; else the number of tokens it took.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or range.

    Source: SpectralX (arXiv 2508.01731), attribute-oriented mixture of adapters; the load is that
    of Shazeer et al. 2017 (arXiv 1701.06538, appendix A).
    """
    check_floating("clean", clean)
    check_shape("clean", clean, ("attributes", "tokens", "experts"))
    check_range("top_k", top_k, 1, clean.shape[-1])
    if (noise is None) != (raw_std is None):
        raise ValueError("noise and raw_std: got one of them, expected both or neither")
    if noise is not None and raw_std is not None:
        check_shape("raw_std", raw_std, tuple(clean.shape))
        check_shape("noise", noise, tuple(clean.shape))
        check_like("raw_std", raw_std, "clean", clean)
        check_like("noise", noise, "clean", clean)
    gates, load = GATING(clean, raw_std, noise, top_k, backend=backend)
    return gates, load


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A frozen linear layer plus a mixture of low-rank adapters on each attribute of its input.

    The last dimension of `x` is split into A equal attributes that share every weight but the
    gate. The maths is in the README of this room.

    Parameters
    ----------
    x : [..., in], A divides in. T is the product of the leading dimensions.
    weight : [out, in] and bias : [out] or None, of the frozen layer; A divides out.
    scaler : [out], multiplies the adapter's output.
    norm1_weight, norm1_bias : [in / A], layer norm of an attribute.
    down : [r, in / A].
    norm2_weight, norm2_bias : [r], layer norm after `down`.
    gate, gate_noise : [A, r, E].
    fc1_weight [E, h, r], fc1_bias [E, h], fc2_weight [E, r, h], fc2_bias [E, r] : the experts.
    up : [out / A, r].
    top_k : experts a token takes, 1 to E.
    noise : [A, T, E], standard normal draws in training, None in evaluation.
    norm_eps : epsilon of both layer norms.
    backend : overrides the default backend.

    All tensors but `noise` have the dtype of `x` unless autocast is on; `noise` may also be
    float32.

    Returns
    -------
    out : [..., out] in the dtype of `x`.
    gates : [A, T, E] and load : [A, E], float32 (float64 for float64); see `noisy_topk_gating`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or range.

    Source: SpectralX (arXiv 2508.01731), attribute-oriented mixture of adapters (AoMoA).
    """
    check_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x: got shape [], expected [..., in]")
    check_shape("weight", weight, ("out", x.shape[-1]))
    check_shape("gate", gate, ("attributes", "rank", "experts"))
    out_width, width = weight.shape
    attributes, rank, experts = gate.shape
    if width % attributes or out_width % attributes:
        raise ValueError(
            f"weight: got shape [{out_width}, {width}], "
            f"expected both divisible by the {attributes} attributes of gate"
        )
    check_shape("fc1_weight", fc1_weight, (experts, "hidden", rank))
    hidden = fc1_weight.shape[1]
    d = width // attributes
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "weight": (weight, (out_width, width)),
        "scaler": (scaler, (out_width,)),
        "norm1_weight": (norm1_weight, (d,)),
        "norm1_bias": (norm1_bias, (d,)),
        "down": (down, (rank, d)),
        "norm2_weight": (norm2_weight, (rank,)),
        "norm2_bias": (norm2_bias, (rank,)),
        "gate": (gate, (attributes, rank, experts)),
        "gate_noise": (gate_noise, (attributes, rank, experts)),
        "fc1_weight": (fc1_weight, (experts, hidden, rank)),
        "fc1_bias": (fc1_bias, (experts, hidden)),
        "fc2_weight": (fc2_weight, (experts, rank, hidden)),
        "fc2_bias": (fc2_bias, (experts, rank)),
        "up": (up, (out_width // attributes, rank)),
    }
    if bias is not None:
        shapes["bias"] = (bias, (out_width,))
    tokens = x.numel() // max(width, 1)
    check_tensors(shapes, "x", x)
    if noise is not None:
        check_shape("noise", noise, (attributes, tokens, experts))
        if noise.dtype == torch.float32:
            check_device("noise", noise, "x", x)
        else:
            check_like("noise", noise, "x", x)
    check_range("top_k", top_k, 1, experts)
    rows = x.reshape(tokens, width)
    arguments = (
        weight, bias, scaler, norm1_weight, norm1_bias, down, norm2_weight, norm2_bias, gate,
        gate_noise, noise, fc1_weight, fc1_bias, fc2_weight, fc2_bias, up,
    )  # fmt: skip
    out, gates, load = AOMOA(rows, *arguments, top_k, norm_eps, backend=backend)
    if x.dim() != 2:  # a view of the output would keep sharded modules from managing it
        out = out.reshape(*x.shape[:-1], out_width)
    return out, gates, load


def balance_loss(gates: Tensor, load: Tensor) -> Tensor:
    """How unevenly the experts are used: cv²(importance) + cv²(load), summed over attributes.

    Parameters
    ----------
    gates : [A, T, E] and load : [A, E], as `aomoa` and `noisy_topk_gating` return them.

    Returns
    -------
    A scalar, differentiable; 0 for a single expert. Importance is the sum of an expert's gates
    over tokens, cv the coefficient of variation over experts (unbiased variance).

    Source: Shazeer et al. 2017 (arXiv 1701.06538), section 4.
    """
    check_shape("gates", gates, ("attributes", "tokens", "experts"))
    check_shape("load", load, (gates.shape[0], gates.shape[2]))
    return reference.balance_loss(gates, load)
