"""The operators around attention: declarations, argument checks, functions.

They are what a pre-norm block is made of beside attention. Their backward is given the inputs alone
and makes norms and hidden layers again.
"""

from __future__ import annotations

from torch import Tensor

from spectralx_kernels._checks import check_floating, check_layer, check_like, check_shape
from spectralx_kernels._operator import Operator
from spectralx_kernels.hypert import reference

NORM_LINEAR = Operator(
    "norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, "
    "float norm_eps) -> Tensor",
    reference.norm_linear,
)
LINEAR_ADD = Operator(
    "linear_add",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor addend) -> Tensor",
    reference.linear_add,
    read_for={3: ()},  # the addend
)
FEED_FORWARD = Operator(
    "feed_forward",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, bool residual, float norm_eps) -> Tensor",
    reference.feed_forward,
)


def _check_rows(x: Tensor, tensors: dict[str, Tensor | None]) -> None:
    check_floating("x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., width] of at least 1")
    for name, tensor in tensors.items():
        if tensor is not None:
            check_like(name, tensor, "x", x)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """A linear layer of the layer-normed rows of x.

    Parameters
    ----------
    x : [..., D], a floating-point dtype.
    norm_weight, norm_bias : [D].
    weight : [O, D] and bias : [O] or None.
    norm_eps : epsilon of the layer norm.
    backend : overrides the default backend.

    Returns
    -------
    [..., O] in the dtype of `x`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: the pre-norm block of SpectralX's hyper tokenizer (arXiv 2508.01731).
    """
    tensors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "weight": weight, "bias": bias}
    _check_rows(x, tensors)
    check_shape("norm_weight", norm_weight, (x.shape[-1],))
    check_shape("norm_bias", norm_bias, (x.shape[-1],))
    check_layer("", weight, bias, x.shape[-1])
    out: Tensor = NORM_LINEAR(x, norm_weight, norm_bias, weight, bias, norm_eps, backend=backend)
    return out


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """A linear layer of x, added to `addend`.

    Parameters
    ----------
    x : [..., D], a floating-point dtype.
    weight : [O, D] and bias : [O] or None.
    addend : [..., O].
    backend : overrides the default backend.

    Returns
    -------
    [..., O] in the dtype of `x`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: the pre-norm block of SpectralX's hyper tokenizer (arXiv 2508.01731).
    """
    _check_rows(x, {"weight": weight, "bias": bias, "addend": addend})
    check_layer("", weight, bias, x.shape[-1])
    check_shape("addend", addend, (*x.shape[:-1], weight.shape[0]))
    out: Tensor = LINEAR_ADD(x, weight, bias, addend, backend=backend)
    return out


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    residual: bool = True,
    norm_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Layer norm, linear, exact GELU and linear of the rows of x, added to x if `residual`.

    Parameters
    ----------
    x : [..., D], a floating-point dtype.
    norm_weight, norm_bias : [D].
    fc1_weight : [H, D] and fc1_bias : [H] or None.
    fc2_weight : [O, H] and fc2_bias : [O] or None; O = D where `residual`.
    norm_eps : epsilon of the layer norm.
    backend : overrides the default backend.

    Returns
    -------
    [..., O] in the dtype of `x`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: blocks and last layers of SpectralX's hyper tokenizer (arXiv 2508.01731).
    """
    tensors = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    _check_rows(x, tensors)
    width = x.shape[-1]
    check_shape("norm_weight", norm_weight, (width,))
    check_shape("norm_bias", norm_bias, (width,))
    check_layer("fc1_", fc1_weight, fc1_bias, width)
    check_layer("fc2_", fc2_weight, fc2_bias, fc1_weight.shape[0])
    if residual and fc2_weight.shape[0] != width:
        raise ValueError(
            f"fc2_weight: got {fc2_weight.shape[0]} outputs, expected {width}, the width of x"
        )
    out: Tensor = FEED_FORWARD(
        x,
        norm_weight,
        norm_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        residual,
        norm_eps,
        backend=backend,
    )
    return out
