"""The prediction heads' operators: declarations, checks, public functions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from spectralx_kernels._checks import check_like, check_map, check_shape
from spectralx_kernels._operator import Operator, Saving
from spectralx_kernels.reconstruction import heads_reference

Activation = Literal["none", "gelu", "relu", "leaky_relu"]
Pair = tuple[Tensor, Tensor]  # a weight and a bias
Convolution = nn.Conv2d | nn.ConvTranspose2d

CHANNEL_NORM = Operator(
    "channel_norm",
    "(Tensor x, Tensor? addend, Tensor weight, Tensor bias, float eps, str before, str after, "
    "float scale) -> Tensor",
    heads_reference.channel_norm,
    keep_format=True,
    read_for={1: ()},  # the addend
)
CHANNEL_NORM_CONV2D = Operator(
    "channel_norm_conv2d",
    "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, str before, str after, "
    "Tensor weight, Tensor? bias, bool transposed, int[] stride, int[] padding) -> Tensor",
    heads_reference.channel_norm_conv2d,
    keep_format=True,
)
GELU_GROUPED_CONV2D = Operator(
    "gelu_grouped_conv2d",
    "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    heads_reference.gelu_grouped_conv2d,
    keep_format=True,
)
PIXEL_HEAD = Operator(
    "pixel_head",
    "(Tensor x, Tensor expand, Tensor expand_bias, Tensor grouped, Tensor grouped_bias, "
    "Tensor mix, Tensor mix_bias, Tensor project, Tensor project_bias, bool keep) "
    "-> (Tensor out, Tensor expanded)",
    heads_reference.pixel_head,
    saving=Saving(heads_reference.pixel_head_saving, hidden=1, kept=(1,)),
    keep_format=True,
)
for _operator in (CHANNEL_NORM, CHANNEL_NORM_CONV2D):
    _operator.add_triton("spectralx_kernels.reconstruction.triton_heads")
GELU_GROUPED_CONV2D.add_triton("spectralx_kernels.reconstruction.triton_grouped")
PIXEL_HEAD.add_triton("spectralx_kernels.reconstruction.triton_pixels")


def _check_activation(name: str, activation: str) -> None:
    known = ("none", "gelu", "relu", "leaky_relu")
    if activation not in known:
        raise ValueError(f"{name}: got {activation!r}, expected one of {', '.join(known)}")


def _check_norm(x: Tensor, norm: nn.LayerNorm) -> Pair:
    """Weight and bias of a norm over the channels of `x`."""
    check_shape("x", x, (x.shape[0], *norm.normalized_shape, "height", "width"))
    if norm.weight is None or norm.bias is None:
        raise ValueError("norm: got one without weight or bias, expected both")
    check_like("weight of norm", norm.weight, "x", x)
    return norm.weight, norm.bias


def channel_norm(
    x: Tensor,
    norm: nn.LayerNorm,
    *,
    before: Activation = "none",
    after: Activation = "none",
    addend: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """``after(norm(before(x))) + scale * addend``, the norm over the channels of each position.

    One pass over `x` there, one back; backward keeps `x` alone and forms the rest again.

    Parameters
    ----------
    x : [B, C, H, W]; a floating-point dtype. Best as ``torch.channels_last``.
    norm : over C channels, with weight and bias.
    before, after : activations: "none", "gelu" (exact), "relu", "leaky_relu" (slope 0.01).
    addend : [B, C, H, W] or None.
    scale : of the addend; no gradient.
    backend : overrides the default backend.

    Returns
    -------
    [B, C, H, W] in the dtype of `x`, ``torch.channels_last``.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or name.

    Source: SpectralX (arXiv 2508.01731), stage 1: the heads of SatMAE++ and ScaleMAE.
    """
    check_map("x", x, "channels")
    weight, bias = _check_norm(x, norm)
    _check_activation("before", before)
    _check_activation("after", after)
    if addend is not None:
        check_shape("addend", addend, x.shape)
        check_like("addend", addend, "x", x)
    out: Tensor = CHANNEL_NORM(
        x, addend, weight, bias, norm.eps, before, after, scale, backend=backend
    )
    return out


def channel_norm_conv2d(
    x: Tensor,
    norm: nn.LayerNorm | None,
    convolution: Convolution,
    *,
    before: Activation = "none",
    after: Activation = "none",
    backend: str | None = None,
) -> Tensor:
    """``convolution(after(norm(before(x))))``; the map that is convolved is not kept for backward.

    Parameters
    ----------
    x : [B, C, H, W]; a floating-point dtype. Best as ``torch.channels_last``.
    norm : over C channels, with weight and bias; None for none.
    convolution : plain or transposed, zero padding, without groups, dilation or output padding.
    before, after : see `channel_norm`.
    backend : overrides the default backend.

    Returns
    -------
    The convolution's map in the dtype of `x`, ``torch.channels_last``.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or name, or a
        convolution of another kind.

    Source: SpectralX (arXiv 2508.01731), stage 1: the heads of SatMAE++ and ScaleMAE.
    """
    check_map("x", x, "channels")
    weight, bias = (None, None) if norm is None else _check_norm(x, norm)
    _check_activation("before", before)
    _check_activation("after", after)
    transposed = isinstance(convolution, nn.ConvTranspose2d)
    plain = (
        convolution.groups == 1
        and convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and not any(convolution.output_padding)
        and not isinstance(convolution.padding, str)
    )
    if not plain:
        raise ValueError(
            f"convolution: got {convolution}, expected zero padding by number, no groups, dilation "
            "or output padding"
        )
    check_shape("x", x, (x.shape[0], convolution.in_channels, "height", "width"))
    check_like("weight of convolution", convolution.weight, "x", x)
    out: Tensor = CHANNEL_NORM_CONV2D(
        x,
        weight,
        bias,
        1e-5 if norm is None else norm.eps,
        before,
        after,
        convolution.weight,
        convolution.bias,
        transposed,
        list(convolution.stride),
        list(convolution.padding),
        backend=backend,
    )
    return out


def gelu_grouped_conv2d(x: Tensor, grouped: Pair, *, backend: str | None = None) -> Tensor:
    """``GELU(conv(GELU(x)))``, a 3x3 convolution to half the channels, each from its own two.

    Backward keeps `x` alone and forms the rest again.

    Parameters
    ----------
    x : [B, 2 C, H, W]; a floating-point dtype. Best as ``torch.channels_last``.
    grouped : weight [C, 2, 3, 3] and bias [C]; a border of one zero.
    backend : overrides the default backend.

    Returns
    -------
    [B, C, H, W] in the dtype of `x`, ``torch.channels_last``.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX (arXiv 2508.01731), stage 1 with ScaleMAE (arXiv 2212.14532).
    """
    check_map("x", x, "channels")
    weight, bias = grouped
    check_shape("weight of grouped", weight, ("channels", 2, 3, 3))
    check_shape("bias of grouped", bias, weight.shape[:1])
    check_shape("x", x, (x.shape[0], 2 * weight.shape[0], "height", "width"))
    for part, tensor in (("weight", weight), ("bias", bias)):
        check_like(f"{part} of grouped", tensor, "x", x)
    out: Tensor = GELU_GROUPED_CONV2D(x, weight, bias, backend=backend)
    return out


def pixel_head(
    x: Tensor,
    expand: Pair,
    grouped: Pair,
    mix: Pair,
    project: Pair,
    *,
    keep: bool = True,
    backend: str | None = None,
) -> Tensor:
    """ScaleMAE's way from a map to pixels: four convolutions with GELUs between them.

    A transposed convolution of stride k, GELU, a grouped 3x3 convolution to half the channels, each
    from its own two, GELU, a 1x1 convolution, GELU, and a transposed convolution of stride n.
    Of the maps between, backward keeps what the first convolution gave, or nothing but `x`. Pixels
    whose gradient is zero need not be formed again: what is not a number there may stay unnoticed.

    Parameters
    ----------
    x : [B, D, h, w]; a floating-point dtype.
    expand : weight [D, E, k, k] and bias [E], E even.
    grouped : weight [E/2, 2, 3, 3] and bias [E/2]; a border of one zero.
    mix : weight [M, E/2, 1, 1] and bias [M].
    project : weight [M, C, n, n] and bias [C].
    keep : whether the first convolution's map, k k E / D times the size of `x`, is kept for
        backward. Without it backward makes that map again, a fifth of all operations, and on the
        CPU none of the wide maps ever exists as a whole. Nothing is kept where no gradient is
        wanted.
    backend : overrides the default backend.

    Returns
    -------
    [B, C, n k h, n k w] in the dtype of `x`, ``torch.channels_last``.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX (arXiv 2508.01731), stage 1 with ScaleMAE (arXiv 2212.14532).
    """
    check_map("x", x, "channels")
    wide, mixed = expand[0].shape[1], mix[0].shape[0]
    up, down = expand[0].shape[-1], project[0].shape[-1]
    if wide % 2:
        raise ValueError(f"weight of expand: got {wide} channels out, expected an even number")
    shapes: dict[str, tuple[Pair, tuple[int | str, ...], int | str]] = {
        "expand": (expand, (x.shape[1], wide, up, up), wide),
        "grouped": (grouped, (wide // 2, 2, 3, 3), wide // 2),
        "mix": (mix, ("channels", wide // 2, 1, 1), mixed),
        "project": (project, (mixed, "channels", down, down), project[0].shape[1]),
    }
    for name, (pair, shape, outs) in shapes.items():
        check_shape(f"weight of {name}", pair[0], shape)
        check_shape(f"bias of {name}", pair[1], (outs,))
        for part, tensor in zip(("weight", "bias"), pair, strict=True):
            check_like(f"{part} of {name}", tensor, "x", x)
    tensors = (x, *expand, *grouped, *mix, *project)
    keep = keep and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    out: Tensor = PIXEL_HEAD(*tensors, keep, backend=backend)
    return out
