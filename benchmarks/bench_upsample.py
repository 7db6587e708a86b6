"""What follows a bilinear upsampling: a convolution, and the loss and prediction of stage 2.

``eager`` forms the upsampled map, once. The loss comes with the prediction at the labels' size, as
in training with a running score; ``fwd+bwd`` differentiates the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks import floors
from benchmarks.case import Case, Draw, Setting, Tensors, rotating
from benchmarks.shapes import FORWARD, UpsampleCeShape, UpsampleConvShape
from spectralx_kernels import upsample_conv2d, upsample_cross_entropy_argmax


def build_conv(shape: UpsampleConvShape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)
    training = mode != FORWARD
    ins, outs = shape.in_channels, shape.out_channels
    weight = draw.normal(outs, ins, 3, 3, scale=(9 * ins) ** -0.5).requires_grad_(training)
    bias = draw.normal(outs, scale=0.1).requires_grad_(training)

    def input_set() -> Tensors:
        x = draw.normal(shape.batch, ins, shape.low, shape.low)
        return (x.requires_grad_(training),)

    def run(x: Tensor, algorithm: str = "auto", backend: str | None = None) -> Tensor:
        return upsample_conv2d(
            x, weight, bias, size=shape.high, algorithm=algorithm, backend=backend
        )

    # The small map and the weight in, the large map out; backward, the same and two gradients.
    small = shape.batch * ins * shape.low**2
    elements = small + weight.numel() + shape.batch * outs * shape.high**2
    if training:
        elements = 2 * elements + small + weight.numel()
    return Case(
        functions={"fused": run, "eager": partial(run, algorithm="map", backend="eager")},
        inputs=rotating(setting, input_set),
        parameters={"weight": weight, "bias": bias},
        floor=lambda: floors.floor_of(floors.upsample_conv(shape, mode), elements, setting),
    )


def build_ce(shape: UpsampleCeShape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)

    def input_set() -> Tensors:
        logits = draw.normal(shape.batch, shape.classes, shape.low, shape.low)
        labels = draw.integers(shape.classes, shape.batch, shape.high, shape.high)
        return logits.requires_grad_(mode != FORWARD), labels

    def run(logits: Tensor, labels: Tensor, backend: str | None = None) -> Tensors:
        found = upsample_cross_entropy_argmax(logits, labels, ignore_index=0, backend=backend)
        return found.loss, found.label

    # Logits and labels in, classes out (64-bit); backward, the same in, the gradient out.
    eight = 8 // setting.dtype.itemsize
    small, large = shape.batch * shape.classes * shape.low**2, shape.batch * shape.high**2 * eight
    elements = small + 2 * large
    if mode != FORWARD:
        elements += 2 * small + large
    return Case(
        functions={"fused": run, "eager": partial(run, backend="eager")},
        inputs=rotating(setting, input_set),
        floor=lambda: floors.floor_of([], elements, setting),
    )


def test_upsample_conv(report: Callable[..., None]) -> None:
    report(build_conv)


def test_upsample_ce(report: Callable[..., None]) -> None:
    report(build_ce)
