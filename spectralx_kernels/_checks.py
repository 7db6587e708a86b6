"""Argument checks at the door of an operator: one line naming the argument, found and expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from spectralx_kernels import _backends

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_floating(name: str, tensor: Tensor) -> None:
    """`tensor` is float32, float64, bfloat16 or float16."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected a floating-point dtype")


def check_integer(name: str, tensor: Tensor) -> None:
    """`tensor` is int64, int32, int16 or uint8."""
    if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected an integer dtype")


def check_device(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """`tensor` has the device of `reference`."""
    if tensor.device != reference.device:
        raise ValueError(
            f"{name}: got device {tensor.device}, expected {reference.device} as {reference_name}"
        )


def check_like(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """`tensor` has the device and, unless autocast will cast it, the dtype of `reference`."""
    if tensor.dtype == reference.dtype and tensor.device == reference.device:
        return  # most calls, and each asks for many tensors
    check_device(name, tensor, reference_name, reference)
    device = tensor.device.type
    casts = device != "meta" and torch.is_autocast_enabled(device)
    if tensor.dtype != reference.dtype and not casts:
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}, expected {reference.dtype} as {reference_name}"
        )


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """`tensor` has the shape `expected`; a string there names a dimension of any size."""
    found = tensor.shape
    if found == expected:
        return
    wrong = len(found) != len(expected) or any(
        not isinstance(want, str) and have != want
        for have, want in zip(found, expected, strict=True)
    )
    if wrong:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: got shape {list(found)}, expected [{wanted}]")


def check_tensors(
    tensors: Mapping[str, tuple[Tensor, tuple[int, ...]]], reference_name: str, reference: Tensor
) -> None:
    """Each tensor has the shape beside it, and `check_like` of `reference`."""
    dtype, device = reference.dtype, reference.device
    for name, (tensor, shape) in tensors.items():
        if tensor.shape == shape and tensor.dtype == dtype and tensor.device == device:
            continue  # most calls, and the time of a short one is that of its checks
        check_shape(name, tensor, shape)
        check_like(name, tensor, reference_name, reference)


def check_range(name: str, value: int | float, low: float, high: float) -> None:
    """``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected {low} to {high}")


def check_map(name: str, x: Tensor, channels: str) -> None:
    """`x` is [batch, `channels`, height, width], floating point, all but the batch at least 1."""
    check_floating(name, x)
    check_shape(name, x, ("batch", channels, "height", "width"))
    if 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: got shape {list(x.shape)}, expected {channels}, height, width of at least 1"
        )


def pair(name: str, value: int | Sequence[int], low: int) -> list[int]:
    """`value` for rows and columns, each at least `low`."""
    sides = [value, value] if isinstance(value, int) else list(value)
    if len(sides) != 2 or min(sides) < low:
        raise ValueError(f"{name}: got {value}, expected two integers of at least {low}")
    return sides


def values_are_free(tensor: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation: a plain CPU tensor, not traced."""
    return (
        tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()
    )


def looks_itself(operator: str, backend: str | None) -> bool:
    """Whether CPU tensors go to a kernel that refuses wrong values in its own pass."""
    return _backends.choose(operator, "cpu", backend) == "cpp"


def check_layer(prefix: str, weight: Tensor, bias: Tensor | None, width: int) -> None:
    """A linear layer's weight [O, width] and bias [O]; errors name them after `prefix`."""
    check_shape(f"{prefix}weight", weight, ("out", width))
    if bias is not None:
        check_shape(f"{prefix}bias", bias, (weight.shape[0],))
