"""Labels and the confusion matrix: declaration, checks, public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralx_kernels._checks import (
    check_device,
    check_integer,
    check_shape,
    looks_itself,
    values_are_free,
)
from spectralx_kernels._operator import Operator
from spectralx_kernels.upsample import reference

CONFUSION_MATRIX_UPDATE = Operator(
    "confusion_matrix_update",
    "(Tensor confusion, Tensor prediction, Tensor target, int ignore_index) -> Tensor",
    reference.confusion_matrix_update,
    differentiable=False,
)
CONFUSION_MATRIX_UPDATE.add_triton("spectralx_kernels.upsample.triton")


def check_labels(
    target: Tensor, num_classes: int, ignore_index: int = -100, *, name: str = "target"
) -> None:
    """Every label is a class in [0, num_classes) or `ignore_index`.

    Looks at the values, which on a GPU makes the host wait: the operators of this room look at
    those of CPU tensors only, their kernels for the CPU in the pass they make anyway.

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


def check_confusion(confusion: Tensor) -> None:
    """`confusion` is int64 and square."""
    if confusion.dtype != torch.int64:
        raise TypeError(f"confusion: got dtype {confusion.dtype}, expected torch.int64")
    check_shape("confusion", confusion, ("classes", "classes"))
    check_shape("confusion", confusion, (confusion.shape[0], confusion.shape[0]))


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
        prediction that is no class is refused for CPU tensors (with backend "eager" outside
        torch.compile only); elsewhere such a pixel is not counted (see `check_labels`).

    Source: SpectralX, stage 2: mIoU, overall accuracy, F1 and kappa all follow from this matrix.
    """
    check_confusion(confusion)
    classes = confusion.shape[0]
    check_integer("prediction", prediction)
    check_integer("target", target)
    check_shape("target", target, tuple(prediction.shape))
    check_device("prediction", prediction, "confusion", confusion)
    check_device("target", target, "confusion", confusion)
    free = values_are_free(target) and values_are_free(prediction)
    if free and not looks_itself(CONFUSION_MATRIX_UPDATE.name, backend):
        check_labels(target, classes, ignore_index)
        counted = torch.where(target == ignore_index, torch.zeros_like(prediction), prediction)
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
            wrong = int(counted.min()) if int(counted.min()) < 0 else int(counted.max())
            raise ValueError(f"prediction: got class {wrong}, expected 0 to {classes - 1}")
    updated: Tensor = CONFUSION_MATRIX_UPDATE(
        confusion, prediction, target, ignore_index, backend=backend
    )
    return updated
