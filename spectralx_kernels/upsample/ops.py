"""The operators of this room: declarations, argument checks, public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from spectralx_kernels._checks import (
    check_device,
    check_floating,
    check_integer,
    check_range,
    check_shape,
)
from spectralx_kernels._operator import Operator
from spectralx_kernels.upsample import reference
from spectralx_kernels.upsample.reference import REDUCTIONS

# Probabilities and what is compared: in float32 under autocast.
UPSAMPLE_CROSS_ENTROPY = Operator(
    "upsample_cross_entropy",
    "(Tensor logits, Tensor target, Tensor? weight, SymInt[2] size, int ignore_index, "
    "float label_smoothing, int reduction, bool align_corners) -> Tensor",
    reference.upsample_cross_entropy,
    autocast_to=torch.float32,
)
UPSAMPLE_ARGMAX = Operator(
    "upsample_argmax",
    "(Tensor logits, SymInt[2] size, bool align_corners) -> Tensor",
    reference.upsample_argmax,
    differentiable=False,
    autocast_to=torch.float32,
)
UPSAMPLE_ARGMAX_PROBABILITY = Operator(
    "upsample_argmax_probability",
    "(Tensor logits, SymInt[2] size, bool align_corners) -> (Tensor probability, Tensor label)",
    reference.upsample_argmax_probability,
    autocast_to=torch.float32,
)
CONFUSION_MATRIX_UPDATE = Operator(
    "confusion_matrix_update",
    "(Tensor confusion, Tensor prediction, Tensor target, int ignore_index) -> Tensor",
    reference.confusion_matrix_update,
    differentiable=False,
)


def _pair(name: str, value: int | Sequence[int], low: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < low:
        raise ValueError(f"{name}: got {value}, expected two integers of at least {low}")
    return pair


def _check_map(name: str, x: Tensor, channels: str) -> None:
    check_floating(name, x)
    check_shape(name, x, ("batch", channels, "height", "width"))
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: got shape {list(x.shape)}, expected {channels}, height, width of at least 1"
        )


def check_labels(
    target: Tensor, num_classes: int, ignore_index: int = -100, *, name: str = "target"
) -> None:
    """Every label is a class in [0, num_classes) or `ignore_index`.

    Looks at the values, which on a GPU makes the host wait: the operators of this room call it
    for CPU tensors only, and not while torch.compile traces.

    Parameters
    ----------
    target : labels, an integer dtype, any shape.
    num_classes : number of classes.
    ignore_index : label of pixels that do not count.
    name : how the error message calls `target`.

    Raises
    ------
    TypeError : no integer dtype.
    ValueError : a label outside; the message names the lowest or the highest.
    """
    check_integer(name, target)
    if target.numel() == 0:
        return
    labels = target.long()
    labels = torch.where(labels == ignore_index, torch.zeros_like(labels), labels)
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{name}: got label {low if low < 0 else high}, expected 0 to {num_classes - 1} "
            f"or ignore_index {ignore_index}"
        )


def _values_are_free(tensor: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation: a plain CPU tensor, not traced."""
    return (
        tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()
    )


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None = None,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits.

    Equal to ``cross_entropy(interpolate(logits, size, mode="bilinear"), target, ...)`` of
    ``torch.nn.functional``, except that a mean over no weight at all (every pixel ignored, or an
    empty batch) is 0 with zero gradient, not NaN.

    Parameters
    ----------
    logits : [B, K, h, w] for K classes.
    target : [B, H, W], labels; int64, int32, int16 or uint8.
    size : height H and width W; those of `target` if None.
    weight : [K], class weights, floating point, or None.
    ignore_index : label of pixels that do not count.
    label_smoothing : 0 to 1.
    reduction : "mean" divides by the summed class weight of the pixels that count; "sum"; or
        "none".
    align_corners : as in ``torch.nn.functional.interpolate``.
    backend : overrides the default backend.

    Returns
    -------
    A scalar, or [B, H, W] for "none", in the dtype of `logits` (float32 under autocast);
    computed in float32 (float64 for float64). Differentiable in `logits` and `weight`.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device, shape or range. A label that
        is neither a class nor `ignore_index` is refused for CPU tensors outside torch.compile;
        elsewhere looking would make the host wait, and such a pixel makes loss and gradient NaN
        (see `check_labels`).

    Source: SpectralX, stage 2: the loss of the segmentation head, which ignores label 0.
    """
    _check_map("logits", logits, "classes")
    classes = logits.shape[1]
    check_integer("target", target)
    check_shape("target", target, (logits.shape[0], "height", "width"))
    check_device("target", target, "logits", logits)
    out_size = _pair("size", tuple(target.shape[1:]) if size is None else size, 1)
    check_shape("target", target, (logits.shape[0], *out_size))
    if weight is not None:
        check_floating("weight", weight)
        check_shape("weight", weight, (classes,))
        check_device("weight", weight, "logits", logits)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if _values_are_free(target):
        check_labels(target, classes, ignore_index)
    loss: Tensor = UPSAMPLE_CROSS_ENTROPY(
        logits,
        target,
        weight,
        out_size,
        ignore_index,
        float(label_smoothing),
        REDUCTIONS.index(reduction),
        align_corners,
        backend=backend,
    )
    return loss


@overload
def upsample_argmax(
    logits: Tensor,
    size: int | Sequence[int],
    *,
    align_corners: bool = False,
    return_probability: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def upsample_argmax(
    logits: Tensor,
    size: int | Sequence[int],
    *,
    align_corners: bool = False,
    return_probability: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def upsample_argmax(
    logits: Tensor,
    size: int | Sequence[int],
    *,
    align_corners: bool = False,
    return_probability: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def upsample_argmax(
    logits: Tensor,
    size: int | Sequence[int],
    *,
    align_corners: bool = False,
    return_probability: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Most probable class of bilinearly upsampled logits.

    Parameters
    ----------
    logits : [B, K, h, w] for K classes.
    size : height H and width W of the prediction.
    align_corners : as in ``torch.nn.functional.interpolate``.
    return_probability : also return the softmax probability of that class.
    backend : overrides the default backend.

    Returns
    -------
    label : [B, H, W], int64. Ties go to the lowest class; a NaN counts as the largest.
    probability : [B, H, W] in the dtype of `logits` (float32 under autocast), if asked for; NaN
        where a logit is NaN. Differentiable.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, shape or range.

    Source: SpectralX, stage 2: prediction at the size of the image.
    """
    _check_map("logits", logits, "classes")
    out_size = _pair("size", size, 1)
    if return_probability:
        probability, label = UPSAMPLE_ARGMAX_PROBABILITY(
            logits, out_size, align_corners, backend=backend
        )
        return label, probability
    only: Tensor = UPSAMPLE_ARGMAX(logits, out_size, align_corners, backend=backend)
    return only


def confusion_matrix_update(
    confusion: Tensor,
    prediction: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    *,
    backend: str | None = None,
) -> Tensor:
    """Add the pixels of a batch to a confusion matrix, on its device, without a host wait.

    Parameters
    ----------
    confusion : [K, K], int64; rows are true classes, columns predicted ones. Not changed.
    prediction : predicted classes, any shape; an integer dtype.
    target : true classes, the shape of `prediction`; an integer dtype.
    ignore_index : label of pixels that are not counted.
    backend : overrides the default backend.

    Returns
    -------
    The new matrix, [K, K], int64.

    Raises
    ------
    TypeError, ValueError : an argument of the wrong dtype, device or shape. A label or a
        prediction that is no class is refused for CPU tensors outside torch.compile; elsewhere
        such a pixel is not counted (see `check_labels`).

    Source: SpectralX, stage 2: mIoU, overall accuracy, F1 and kappa all follow from this matrix.
    """
    if confusion.dtype != torch.int64:
        raise TypeError(f"confusion: got dtype {confusion.dtype}, expected torch.int64")
    check_shape("confusion", confusion, ("classes", "classes"))
    classes = confusion.shape[0]
    check_shape("confusion", confusion, (classes, classes))
    check_integer("prediction", prediction)
    check_integer("target", target)
    check_shape("target", target, tuple(prediction.shape))
    check_device("prediction", prediction, "confusion", confusion)
    check_device("target", target, "confusion", confusion)
    if _values_are_free(target) and _values_are_free(prediction):
        check_labels(target, classes, ignore_index)
        counted = torch.where(target == ignore_index, torch.zeros_like(prediction), prediction)
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
            wrong = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
            raise ValueError(f"prediction: got class {wrong}, expected 0 to {classes - 1}")
    updated: Tensor = CONFUSION_MATRIX_UPDATE(
        confusion, prediction, target, ignore_index, backend=backend
    )
    return updated
