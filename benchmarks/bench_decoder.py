"""UPerNet, whole: neck and head on four feature maps of ViT-L.

``eager`` forms every upsampled map. Dropout is off, so that implementations can be compared.
``fwd+bwd`` trains with batch statistics, for which two images are the least; see
`use_running_statistics`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.case import Case, Draw, Setting, Tensors, rotating
from benchmarks.shapes import FORWARD, DecoderShape
from benchmarks.variants import (
    compiled,
    on_reference,
    use_running_statistics,
    with_plain_decoder,
)
from spectralx.decoder import UPerNet

LEVELS = 4


def build(shape: DecoderShape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)
    training = mode != FORWARD
    model = UPerNet(
        [shape.width] * LEVELS, shape.classes, head_channels=shape.head_width, dropout=0.0
    )
    draw.fill(model).train(training)
    use_running_statistics(model.head)
    plain = with_plain_decoder(model)

    def input_set() -> Tensors:
        size = (shape.batch, shape.width, shape.side, shape.side)
        return tuple(draw.normal(*size).requires_grad_(training) for _ in range(LEVELS))

    def fused(*features: Tensor) -> Tensor:
        logits: Tensor = model(features)
        return logits

    def reference(*features: Tensor) -> Tensor:
        logits: Tensor = plain(features)
        return logits

    # Maps and weights in, logits out; backward, the same and as many gradients.
    small = LEVELS * shape.batch * shape.width * shape.side**2
    held = sum(parameter.numel() for parameter in model.parameters())
    elements = small + held + shape.batch * shape.classes * (4 * shape.side) ** 2
    if training:
        elements = 2 * elements + small + held
    return Case(
        functions={
            "fused": fused,
            "eager": on_reference(reference),
            "compile": compiled(reference),
        },
        inputs=rotating(setting, input_set),
        parameters=dict(model.named_parameters()) if training else {},
        constants=[*model.parameters(), *model.buffers()],
        floor=lambda: floors.floor_of(floors.decoder(shape, mode), elements, setting),
        truth=torch.float32,
    )


def test_decoder(report: Callable[..., None]) -> None:
    report(build)
