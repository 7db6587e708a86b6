"""The operators of the stem: declarations, argument checks, public functions."""

from __future__ import annotations

from torch import Tensor

from spectralx_kernels._checks import check_floating, check_like, check_shape
from spectralx_kernels._operator import Operator
from spectralx_kernels.hypert import reference

LIFT = Operator(
    "lift_convolution",
    "(Tensor images, Tensor lift_weight, Tensor lift_bias, Tensor weight, Tensor bias) "
    "-> (Tensor lifted, Tensor convolved)",
    reference.lift_convolution,
)


def lift_convolution(
    images: Tensor,
    lift_weight: Tensor,
    lift_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution of the bands and a 3x3 convolution (zero padding) of its result.

    One operator because the two are linear: with few bands the first folds into the second.

    Parameters
    ----------
    images : [B, C, H, W], a floating-point dtype.
    lift_weight : [M, C, 1, 1] and lift_bias : [M], the 1x1 convolution.
    weight : [N, M, 3, 3] and bias : [N], the 3x3 convolution.
    backend : overrides the default backend.

    Returns
    -------
    lifted : [B, M, H, W], the 1x1 convolution (a residual connection needs it).
    convolved : [B, N, H, W]. Both in the dtype of `images`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape.

    Source: SpectralX (arXiv 2508.01731), first layers of the hyper tokenizer.
    """
    check_floating("images", images)
    check_shape("images", images, ("batch", "bands", "height", "width"))
    check_shape("lift_weight", lift_weight, ("lifted", images.shape[1], 1, 1))
    lifted_channels = lift_weight.shape[0]
    check_shape("lift_bias", lift_bias, (lifted_channels,))
    check_shape("weight", weight, ("channels", lifted_channels, 3, 3))
    check_shape("bias", bias, (weight.shape[0],))
    tensors = {"lift_weight": lift_weight, "lift_bias": lift_bias, "weight": weight, "bias": bias}
    for name, tensor in tensors.items():
        check_like(name, tensor, "images", images)
    lifted, convolved = LIFT(images, lift_weight, lift_bias, weight, bias, backend=backend)
    return lifted, convolved
