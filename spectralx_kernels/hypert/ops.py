"""The operators of this room: declarations, argument checks, public functions."""

from __future__ import annotations

from torch import Tensor

from spectralx_kernels._checks import check_floating, check_like, check_range, check_shape
from spectralx_kernels._operator import Operator
from spectralx_kernels.hypert import reference

WINDOW_ATTENTION = Operator(
    "window_attention",
    "(Tensor qkv, Tensor? padding, int num_heads, int[] window) -> Tensor",
    reference.window_attention,
)
ATTRIBUTE_MATCH = Operator(
    "attribute_match",
    "(Tensor features, Tensor queries, Tensor norm_weight, Tensor norm_bias, Tensor kv_weight, "
    "float norm_eps) -> Tensor",
    reference.attribute_match,
)


def window_attention(
    qkv: Tensor,
    padding: Tensor | None = None,
    *,
    num_heads: int,
    window: tuple[int, int],
    backend: str | None = None,
) -> Tensor:
    """Multi-head self-attention within non-overlapping windows of a map.

    Where windows do not divide the map it is padded at the bottom and at the right. Padded
    positions are keys like any other; their outputs are cropped. A window as large as the map is
    plain attention over all positions.

    Parameters
    ----------
    qkv : [B, H, W, 3D], queries, keys and values of each position, each `num_heads` heads of
        width D / num_heads; a floating-point dtype.
    padding : [3D], the queries, keys and values of a padded position, which differ from zero
        where the projection has a bias. Needed where windows do not divide the map, and without
        effect where they do.
    num_heads : divides D.
    window : rows and columns of a window, at least 1 each.
    backend : overrides the default backend.

    Returns
    -------
    [B, H, W, D] in the dtype of `qkv`, heads side by side. Scores are divided by
    ``sqrt(D / num_heads)``.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or range.

    Source: SpectralX (arXiv 2508.01731), spatial and spectral branch of the hyper tokenizer.
    """
    check_floating("qkv", qkv)
    check_shape("qkv", qkv, ("batch", "height", "width", "3 * channels"))
    channels = qkv.shape[-1]
    if channels == 0 or channels % 3:
        raise ValueError(f"qkv: got {channels} channels, expected a positive multiple of 3")
    if num_heads < 1 or channels // 3 % num_heads:
        raise ValueError(
            f"num_heads: got {num_heads}, expected a divisor of the {channels // 3} channels"
        )
    if len(window) != 2 or min(window) < 1:
        raise ValueError(f"window: got {tuple(window)}, expected two sizes of at least 1")
    divides = qkv.shape[1] % window[0] == 0 and qkv.shape[2] % window[1] == 0
    if padding is not None:
        check_shape("padding", padding, (channels,))
        check_like("padding", padding, "qkv", qkv)
    elif not divides:
        raise ValueError(
            f"padding: got None, expected a tensor [{channels}] since windows {tuple(window)} do "
            f"not divide the map {tuple(qkv.shape[1:3])}"
        )
    attended: Tensor = WINDOW_ATTENTION(
        qkv, None if divides else padding, num_heads, list(window), backend=backend
    )
    return attended


def attribute_match(
    features: Tensor,
    queries: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    *,
    norm_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Cross-attention of queries shared by all images with the layer-normed features of each.

    With ``k, v = LN(features) kv_weight^T`` the result is ``softmax(q k^T / sqrt(d)) v``, one
    head. The maths is in the README of this room.

    Parameters
    ----------
    features : [B, N, F], N >= 1; a floating-point dtype.
    queries : [M, d], projected already; the same for every image.
    norm_weight, norm_bias : [F], layer norm of a feature.
    kv_weight : [2d, F], keys first.
    norm_eps : epsilon of the layer norm.
    backend : overrides the default backend.

    Returns
    -------
    [B, M, d] in the dtype of `features`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX (arXiv 2508.01731), attribute matching of the hyper tokenizer.
    """
    check_floating("features", features)
    check_shape("features", features, ("batch", "positions", "width"))
    check_range("positions of features", features.shape[1], 1, 2**31)
    check_shape("queries", queries, ("queries", "width"))
    width = features.shape[2]
    check_shape("norm_weight", norm_weight, (width,))
    check_shape("norm_bias", norm_bias, (width,))
    check_shape("kv_weight", kv_weight, (2 * queries.shape[1], width))
    tensors = {
        "queries": queries,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "kv_weight": kv_weight,
    }
    for name, tensor in tensors.items():
        check_like(name, tensor, "features", features)
    matched: Tensor = ATTRIBUTE_MATCH(
        features, queries, norm_weight, norm_bias, kv_weight, norm_eps, backend=backend
    )
    return matched
