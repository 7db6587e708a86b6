"""Loss and prediction of upsampled logits: declarations, argument checks, public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from spectralx_kernels._checks import (
    check_device,
    check_floating,
    check_integer,
    check_map,
    check_range,
    check_shape,
    looks_itself,
    pair,
    values_are_free,
)
from spectralx_kernels._operator import Operator, Saving
from spectralx_kernels.upsample import reference
from spectralx_kernels.upsample.confusion import check_confusion, check_labels
from spectralx_kernels.upsample.reference import REDUCTIONS, accumulation_dtype

_LOSS_OPTIONS = (
    "SymInt[2] size, int ignore_index, float label_smoothing, int reduction, bool align_corners, "
    "bool with_gradient"
)


def _fake_loss(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, _align_corners, with_gradient = options
    pixels = REDUCTIONS[reduction] == "none"
    loss = logits.new_empty(target.shape if pixels else ())
    shape = logits.shape if with_gradient and not pixels else (0,)
    return loss, logits.new_empty(shape, dtype=accumulation_dtype(logits.dtype))


def _fake_loss_argmax(
    logits: Tensor, target: Tensor, weight: Tensor | None, confusion: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, gradient = _fake_loss(logits, target, *options)
    label = torch.empty_like(target, dtype=torch.int64, memory_format=torch.contiguous_format)
    counted = label.new_empty((0, 0) if confusion is None else confusion.shape)
    return loss, label, counted, gradient


def _saving(forward: Callable[..., Any], outputs: int) -> Saving:
    """`forward` with the gradient of a loss that is one number as a further, hidden output."""

    def with_gradient(logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
        leaf = logits.detach().to(accumulation_dtype(logits.dtype))
        gradient = leaf.new_empty(0)
        if others[-1] and REDUCTIONS[others[-3]] != "none":
            # From wide logits: a loss rounded to 16 bits would not be differentiated any worse, but
            # its gradient would be kept rounded.
            with torch.enable_grad():
                loss = forward(leaf.requires_grad_(), *others)
                loss = loss if isinstance(loss, Tensor) else loss[0]
                (gradient,) = torch.autograd.grad(loss, leaf)
        found = forward(logits, *others)
        return (*((found,) if isinstance(found, Tensor) else found), gradient)

    return Saving(with_gradient, hidden=1, kept=(outputs,))


# Probabilities and what is compared: in float32 under autocast.
UPSAMPLE_CROSS_ENTROPY = Operator(
    "upsample_cross_entropy",
    f"(Tensor logits, Tensor target, Tensor? weight, {_LOSS_OPTIONS}) "
    "-> (Tensor loss, Tensor gradient)",
    reference.upsample_cross_entropy,
    autocast_to=torch.float32,
    saving=_saving(reference.upsample_cross_entropy, 1),
    fake=lambda logits, target, weight, *options: _fake_loss(logits, target, *options),
)
UPSAMPLE_CROSS_ENTROPY_ARGMAX = Operator(
    "upsample_cross_entropy_argmax",
    f"(Tensor logits, Tensor target, Tensor? weight, Tensor? confusion, {_LOSS_OPTIONS}) "
    "-> (Tensor loss, Tensor label, Tensor confusion, Tensor gradient)",
    reference.upsample_cross_entropy_argmax,
    autocast_to=torch.float32,
    saving=_saving(reference.upsample_cross_entropy_argmax, 3),
    fake=_fake_loss_argmax,
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

for _operator in (
    UPSAMPLE_CROSS_ENTROPY,
    UPSAMPLE_CROSS_ENTROPY_ARGMAX,
    UPSAMPLE_ARGMAX,
    UPSAMPLE_ARGMAX_PROBABILITY,
):
    _operator.add_triton("spectralx_kernels.upsample.triton")


class LossAndPrediction(NamedTuple):
    """What `upsample_cross_entropy_argmax` returns."""

    loss: Tensor
    label: Tensor
    confusion: Tensor | None


class _LossArguments(NamedTuple):
    size: list[int]
    reduction: int
    with_gradient: bool


def _check_loss(
    operator: Operator,
    logits: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str | None,
    ignore_index: int,
) -> _LossArguments:
    """Checks at the door of the losses; what the operator takes in another form."""
    check_map("logits", logits, "classes")
    classes = logits.shape[1]
    check_integer("target", target)
    check_shape("target", target, (logits.shape[0], "height", "width"))
    check_device("target", target, "logits", logits)
    out_size = pair("size", tuple(target.shape[1:]) if size is None else size, 1)
    check_shape("target", target, (logits.shape[0], *out_size))
    if weight is not None:
        check_floating("weight", weight)
        check_shape("weight", weight, (classes,))
        check_device("weight", weight, "logits", logits)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if values_are_free(target) and not looks_itself(operator.name, backend):
        check_labels(target, classes, ignore_index)
    return _LossArguments(
        out_size,
        REDUCTIONS.index(reduction),
        torch.is_grad_enabled() and logits.requires_grad,
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
        is neither a class nor `ignore_index` is refused for CPU tensors (with backend "eager"
        outside torch.compile only); elsewhere looking would make the host wait, and such a pixel
        makes loss and gradient NaN (see `check_labels`).

    Source: SpectralX, stage 2: the loss of the segmentation head, which ignores label 0.
    """
    arguments = _check_loss(
        UPSAMPLE_CROSS_ENTROPY, logits, target, size, weight, label_smoothing, reduction, backend,
        ignore_index,
    )  # fmt: skip
    loss: Tensor = UPSAMPLE_CROSS_ENTROPY(
        logits,
        target,
        weight,
        arguments.size,
        ignore_index,
        float(label_smoothing),
        arguments.reduction,
        align_corners,
        arguments.with_gradient,
        backend=backend,
    )
    return loss


def upsample_cross_entropy_argmax(
    logits: Tensor,
    target: Tensor,
    size: int | Sequence[int] | None = None,
    *,
    confusion: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    backend: str | None = None,
) -> LossAndPrediction:
    """`upsample_cross_entropy`, `upsample_argmax` and `confusion_matrix_update` in one pass.

    For a training step that logs its score, and for validation: the logits are upsampled once.

    Parameters
    ----------
    confusion : [K, K], int64, counted on from here and not changed; None: nothing is counted.
        `ignore_index` holds for the loss and for the counts.
    logits, target, size, weight, ignore_index, label_smoothing, reduction, align_corners,
    backend : as in `upsample_cross_entropy`.

    Returns
    -------
    loss : as of `upsample_cross_entropy`, differentiable in `logits` and `weight`.
    label : [B, H, W], int64, as of `upsample_argmax`.
    confusion : the new matrix, as of `confusion_matrix_update`, or None.

    Raises
    ------
    TypeError, ValueError : as the three functions.

    Source: SpectralX, stage 2: loss and score of the segmentation head.
    """
    arguments = _check_loss(
        UPSAMPLE_CROSS_ENTROPY_ARGMAX, logits, target, size, weight, label_smoothing, reduction,
        backend, ignore_index,
    )  # fmt: skip
    if confusion is not None:
        check_confusion(confusion)
        check_shape("confusion", confusion, (logits.shape[1], logits.shape[1]))
        check_device("confusion", confusion, "logits", logits)
    loss, label, counted = UPSAMPLE_CROSS_ENTROPY_ARGMAX(
        logits,
        target,
        weight,
        confusion,
        arguments.size,
        ignore_index,
        float(label_smoothing),
        arguments.reduction,
        align_corners,
        arguments.with_gradient,
        backend=backend,
    )
    return LossAndPrediction(loss, label, None if confusion is None else counted)


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
    check_map("logits", logits, "classes")
    out_size = pair("size", size, 1)
    if return_probability:
        probability, label = UPSAMPLE_ARGMAX_PROBABILITY(
            logits, out_size, align_corners, backend=backend
        )
        return label, probability
    only: Tensor = UPSAMPLE_ARGMAX(logits, out_size, align_corners, backend=backend)
    return only
