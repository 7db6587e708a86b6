"""The operators of this room: declarations, argument checks, public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralx_kernels._checks import (
    check_floating,
    check_integer,
    check_like,
    check_range,
    check_shape,
)
from spectralx_kernels._operator import Operator
from spectralx_kernels.refine import reference

MATCH = Operator(
    "match_argmax",
    "(Tensor queries, Tensor keys, float scale) -> Tensor",
    reference.match_argmax,
    differentiable=False,
)
GATHER_NORM = Operator(
    "gather_norm",
    "(Tensor tokens, Tensor match, Tensor norm_weight, Tensor norm_bias, float norm_eps) -> Tensor",
    reference.gather_norm,
)
GATHER_NORM_MIX = Operator(
    "gather_norm_mix",
    "(Tensor tokens, Tensor match, Tensor norm_weight, Tensor norm_bias, Tensor mixing, "
    "float norm_eps) -> Tensor",
    reference.gather_norm_mix,
)
# The tokens are the residual stream: autocast leaves it in float32.
ADD_WEIGHTED = Operator(
    "add_weighted_halves",
    "(Tensor tokens, Tensor spatial_weight, Tensor spectral_weight, Tensor scale) -> Tensor",
    reference.add_weighted_halves,
    autocast_to=torch.float32,
)
for _operator in (MATCH, GATHER_NORM, GATHER_NORM_MIX, ADD_WEIGHTED):
    _operator.add_triton("spectralx_kernels.refine.triton")


def match_argmax(
    queries: Tensor, keys: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """For each key the query that attends to it most, after a softmax over the keys.

    With ``s_ij = scale * queries_i . keys_j`` it is ``argmax_i (s_ij - logsumexp_j s_ij)``.

    Parameters
    ----------
    queries : [B, M, d], M >= 1; a floating-point dtype.
    keys : [B, N, d].
    scale : of the scores; ``1 / sqrt(d)`` by default.
    backend : overrides the default backend.

    Returns
    -------
    [B, N], int64, not differentiable. Scores are held in float32 (float64 for float64); equal ones
    go to the lowest index. A NaN counts as the largest value, so a query with a NaN takes every
    key and a key with a NaN goes to query 0.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX (arXiv 2508.01731), matching of the attribute-refined adapter.
    """
    check_floating("queries", queries)
    check_shape("queries", queries, ("batch", "queries", "width"))
    check_range("rows of queries", queries.shape[1], 1, 2**31)
    check_shape("keys", keys, (queries.shape[0], "keys", queries.shape[2]))
    check_like("keys", keys, "queries", queries)
    if scale is None:
        scale = max(queries.shape[2], 1) ** -0.5
    match: Tensor = MATCH(queries, keys, scale, backend=backend)
    return match


def _check_gather(tokens: Tensor, match: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> None:
    check_floating("tokens", tokens)
    check_shape("tokens", tokens, ("batch", "tokens", "width"))
    check_shape("match", match, (tokens.shape[0], "keys"))
    check_integer("match", match)
    check_shape("norm_weight", norm_weight, (tokens.shape[2],))
    check_shape("norm_bias", norm_bias, (tokens.shape[2],))
    check_like("norm_weight", norm_weight, "tokens", tokens)
    check_like("norm_bias", norm_bias, "tokens", tokens)
    if match.device != tokens.device:
        raise ValueError(f"match: got device {match.device}, expected {tokens.device} as tokens")
    # Looking into a GPU's memory would stall it, and a compiler cannot: there it is the caller's.
    if match.device.type == "cpu" and match.numel() and not torch.compiler.is_compiling():
        check_range("match", int(match.min()), 0, tokens.shape[1] - 1)
        check_range("match", int(match.max()), 0, tokens.shape[1] - 1)


def gather_norm(
    tokens: Tensor,
    match: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    norm_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """The layer-normed token that each key was matched with.

    Parameters
    ----------
    tokens : [B, N, H], a floating-point dtype; a strided view (half of the channels) is fine.
    match : [B, K], an integer dtype, 0 to N - 1: as `match_argmax` returns it. The range is
        checked on the CPU outside ``torch.compile`` only.
    norm_weight, norm_bias : [H]; norm_eps : epsilon of the layer norm.
    backend : overrides the default backend.

    Returns
    -------
    [B, K, H] in the dtype of `tokens`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or range.

    Source: SpectralX (arXiv 2508.01731), attribute-refined adapter.
    """
    _check_gather(tokens, match, norm_weight, norm_bias)
    gathered: Tensor = GATHER_NORM(tokens, match, norm_weight, norm_bias, norm_eps, backend=backend)
    return gathered


def gather_norm_mix(
    tokens: Tensor,
    match: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mixing: Tensor,
    *,
    norm_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """A linear map over the keys of what `gather_norm` returns.

    One operator because the gather folds into `mixing`: columns that meet the same token are
    added up, and K gathered rows are never formed.

    Parameters
    ----------
    tokens, match, norm_weight, norm_bias, norm_eps : as in `gather_norm`.
    mixing : [T, K].
    backend : overrides the default backend.

    Returns
    -------
    [B, T, H] in the dtype of `tokens`: ``mixing @ gather_norm(tokens, match, ...)``.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or range.

    Source: SpectralX (arXiv 2508.01731), spectral branch of the attribute-refined adapter.
    """
    _check_gather(tokens, match, norm_weight, norm_bias)
    check_shape("mixing", mixing, ("mixed", match.shape[1]))
    check_like("mixing", mixing, "tokens", tokens)
    mixed: Tensor = GATHER_NORM_MIX(
        tokens, match, norm_weight, norm_bias, mixing, norm_eps, backend=backend
    )
    return mixed


def add_weighted_halves(
    tokens: Tensor,
    spatial_weight: Tensor,
    spectral_weight: Tensor,
    scale: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Tokens plus a share of themselves, weighted by token and by half of the channels.

    Parameters
    ----------
    tokens : [B, N, D], D even; a floating-point dtype.
    spatial_weight, spectral_weight : [B, N], weights of the first and of the second half.
    scale : a scalar tensor.
    backend : overrides the default backend.

    Returns
    -------
    [B, N, D], ``tokens + scale * [spatial_weight * first, spectral_weight * second]``, in the
    dtype of `tokens`; in float32 under autocast.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX (arXiv 2508.01731), attribute-refined adapter.
    """
    check_floating("tokens", tokens)
    check_shape("tokens", tokens, ("batch", "tokens", "width"))
    if tokens.shape[2] % 2:
        raise ValueError(f"tokens: got width {tokens.shape[2]}, expected a multiple of 2")
    check_shape("spatial_weight", spatial_weight, tuple(tokens.shape[:2]))
    check_shape("spectral_weight", spectral_weight, tuple(tokens.shape[:2]))
    check_shape("scale", scale, ())
    tensors = {
        "spatial_weight": spatial_weight,
        "spectral_weight": spectral_weight,
        "scale": scale,
    }
    for name, tensor in tensors.items():
        check_like(name, tensor, "tokens", tokens)
    refined: Tensor = ADD_WEIGHTED(tokens, spatial_weight, spectral_weight, scale, backend=backend)
    return refined
