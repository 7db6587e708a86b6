"""HyperT: the spatial-spectral tokenizer, whole.

``fwd`` is evaluation. ``fwd+bwd`` is training, as published only of the low-rank path and the
scaler; shapes that end in ``-all`` train everything.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import floors
from benchmarks.case import Case, Draw, Setting, Tensors, rotating
from benchmarks.shapes import FORWARD, WAVELENGTHS, HypertShape
from benchmarks.variants import compiled, on_reference
from spectralx_kernels import HyperT


def drawn_model(shape: HypertShape, draw: Draw) -> HyperT:
    """HyperT of these sizes with drawn weights."""
    model = HyperT(
        shape.bands,
        WAVELENGTHS[shape.sensor],
        embed_dim=shape.embed_dim,
        image_size=shape.image_size,
        trainable=shape.trainable,
    )
    draw.fill(model)
    return model


def build(shape: HypertShape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)
    model = drawn_model(shape, draw).train(mode != FORWARD)

    def input_set() -> Tensors:
        side = shape.image_size
        return (draw.normal(shape.batch, shape.bands, side, side, scale=0.3, offset=0.5),)

    def run(images: Tensor) -> Tensors:
        outputs: Tensors = model(images)
        return outputs

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # Images and weights in, tokens and both features out; backward, the trained gradients.
    elements = shape.batch * (shape.bands * shape.image_size**2 + shape.tokens * shape.embed_dim)
    elements += sum(parameter.numel() for parameter in model.parameters())
    if mode != FORWARD:
        elements += shape.batch * shape.tokens * shape.embed_dim + sum(
            p.numel() for p in trained.values()
        )
    return Case(
        functions={"fused": run, "eager": on_reference(run), "compile": compiled(run)},
        inputs=rotating(setting, input_set),
        parameters=trained if mode != FORWARD else {},
        constants=[*model.parameters(), *model.buffers()],
        floor=lambda: floors.floor_of(floors.hypert(shape, mode), elements, setting),
    )


def test_hypert(report: Callable[..., None]) -> None:
    report(build)
