"""Batch norm and ReLU after a convolution: declarations, checks, public functions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralx_kernels._checks import check_device, check_floating, check_map, check_shape
from spectralx_kernels._operator import Operator
from spectralx_kernels.upsample import reference

CHANNEL_MOMENTS = Operator(
    "channel_moments", "(Tensor x) -> Tensor", reference.channel_moments, differentiable=False
)
CHANNEL_MOMENTS.add_triton("spectralx_kernels.upsample.triton_norm")

# The gradient of x goes through the moments too where they are its own (`batch`).
BATCH_NORM_RELU = Operator(
    "batch_norm_relu",
    "(Tensor x, Tensor moments, Tensor? weight, Tensor? bias, float eps, bool relu, bool batch) "
    "-> Tensor",
    reference.batch_norm_relu,
    keep_format=True,
)
BATCH_NORM_RELU.add_triton("spectralx_kernels.upsample.triton_norm")


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d, moments: Tensor, count: int) -> None:
    """Move the running statistics as ``nn.BatchNorm2d`` does, without waiting for the device."""
    mean, variance, seen = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None
    assert variance is not None
    assert seen is not None
    seen.add_(1)
    step = 1 / seen if norm.momentum is None else norm.momentum
    unbiased = moments[1] * (count / (count - 1))
    mean.add_((moments[0].to(mean.dtype) - mean) * step)
    variance.add_((unbiased.to(variance.dtype) - variance) * step)


def batch_norm_relu(
    x: Tensor,
    norm: nn.BatchNorm2d,
    *,
    relu: bool = True,
    moments: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``relu(norm(x))`` with what `norm` holds, in training and in evaluation.

    In training one pass forms mean and variance, one writes the output; backward reads `x` and the
    incoming gradient twice. Kept for it are `x` and [2, C] numbers: not the output, which the ReLU
    is told from again. Running statistics move as those of `norm` do.

    Parameters
    ----------
    x : [B, C, H, W].
    norm : a plain batch norm of C channels; its parameters, statistics and mode.
    relu : the larger of the normalised value and 0.
    moments : mean and biased variance of the channels of `x`, [2, C], where they are known
        (`upsample_conv2d` forms them while it writes its output); read in training only.
    backend : overrides the default backend.

    Returns
    -------
    [B, C, H, W] in the dtype of `x`, ``torch.channels_last`` if `x` is; differentiable in `x` and
    the weight and bias of `norm`. Under autocast computed in float32 from `x` as it is.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape; fewer than two values
        a channel to average over.

    Source: SpectralX, stage 2: UPerNet's convolutions, each followed by batch norm and ReLU.
    """
    check_map("x", x, "channels")
    check_shape("x", x, (x.shape[0], norm.num_features, "rows", "columns"))
    mean, variance = norm.running_mean, norm.running_var
    for held in (norm.weight, norm.bias, mean, variance):
        if held is not None:
            check_device("norm", held, "x", x)
    if moments is not None:
        check_floating("moments", moments)
        check_device("moments", moments, "x", x)
        check_shape("moments", moments, (2, norm.num_features))
    batch = norm.training or mean is None or variance is None
    device = x.device.type
    with torch.autocast(device if device != "meta" else "cpu", enabled=False):
        if batch:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            if count < 2:
                raise ValueError(
                    f"x: got shape {list(x.shape)} in training, expected more than 1 value per "
                    "channel"
                )
            if moments is None:
                moments = CHANNEL_MOMENTS(x.detach(), backend=backend)
            if norm.training and norm.track_running_stats:
                _follow(norm, moments, count)
        else:
            assert mean is not None
            assert variance is not None
            moments = torch.stack([mean, variance])
        out: Tensor = BATCH_NORM_RELU(
            x, moments, norm.weight, norm.bias, norm.eps, relu, batch, backend=backend
        )
    return out


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that is ``norm`` in evaluation after another.

    Parameters
    ----------
    weight : [O, C, ky, kx].
    bias : [O] or None.
    norm : of O channels, with running statistics.

    Returns
    -------
    weight, bias : in the dtype of `weight`; rounded once.

    Raises
    ------
    ValueError : a norm without running statistics or of another number of channels.
    """
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("norm: got one without running statistics, expected them")
    check_shape("weight", weight, (norm.num_features, weight.shape[1], "rows", "columns"))
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = (variance.to(wide) + norm.eps).rsqrt()
    if norm.affine:
        scale = norm.weight.to(wide) * scale
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    shift = shift * scale
    if norm.affine:
        shift = norm.bias.to(wide) + shift
    folded = (weight * scale.reshape(-1, 1, 1, 1)).to(weight.dtype)
    return folded, shift.to(weight.dtype)
