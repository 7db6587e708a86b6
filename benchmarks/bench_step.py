"""One training step of either stage: forward, loss, backward and AdamW, on the whole model.

Below float32 the step runs under autocast, on float32 weights. ``eager`` runs the reference
operators and, in stage 1, a head of plain modules, in stage 2 a decoder that forms every upsampled
map; ``dispatch`` is that with the per-expert algorithm in every adapted layer; ``compile`` is
``torch.compile`` of it. Dropout is off and gate noise is drawn from the same seed, so that
implementations can be compared. Two images are the least that UPerNet's batch statistics allow: a
step of stage 2 on one image has its head on running ones (`stages.set_statistics`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.case import Case, Draw, Setting, rotating
from benchmarks.floors import Product
from benchmarks.shapes import DecoderShape, HypertShape, StepShape
from benchmarks.stages import STAGES, is_narrow, optimizer_of, set_statistics
from benchmarks.variants import compiled, on_reference, with_dispatch


def products_of(shape: StepShape) -> list[Product]:
    """The matrix products of a step that cannot be avoided."""
    tokenizer = HypertShape(
        name="",
        batch=shape.batch,
        sensor=shape.sensor,
        image_size=shape.image_size,
        embed_dim=shape.embed_dim,
    )
    if shape.stage == "stage1":
        return floors.reconstruction_step(shape, tokenizer)
    decoder = DecoderShape(
        name="",
        batch=shape.batch,
        classes=shape.classes,
        width=shape.embed_dim,
        side=shape.image_size // 16,
    )
    return floors.step(shape, tokenizer, decoder)


@lru_cache(maxsize=1)
def _drawn(stage: str, sizes: StepShape, device: str) -> tuple[Any, dict[str, Tensor]]:
    """The model of a step, and what changes in it as it was drawn: drawing takes longer than many
    steps, and neither batch nor dtype make another model."""
    model = STAGES[stage].model_of(sizes, Draw(Setting(device), seed=0))
    changing = [*model.named_parameters(), *model.named_buffers()]
    state = {
        name: value.detach().clone()
        for name, value in changing
        if value.requires_grad or not isinstance(value, nn.Parameter)
    }
    return model, state


def drawn_model(shape: StepShape, device: str) -> Any:
    """The model of a step, as drawn whatever has been done to it since."""
    model, state = _drawn(shape.stage, replace(shape, name="", batch=1), device)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name in state:
                value.copy_(state[name])
                value.grad = None
    set_statistics(model, shape.batch)
    return model


def build(shape: StepShape, mode: str, setting: Setting) -> Case:
    # Weights stay in float32; autocast rounds where the timed dtype is narrower.
    draw = Draw(Setting(setting.device, rotate=setting.rotate), seed=1)
    stage = STAGES[shape.stage]
    model = drawn_model(shape, setting.device)
    plain = stage.plain(model)
    dispatched = with_dispatch(plain)

    narrow = is_narrow(setting.dtype)

    def step_of(loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            with torch.autocast(setting.device, setting.dtype, enabled=narrow):
                loss = loss_of(*inputs)
            loss.backward()
            return loss.detach()

        return run

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(model)

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # Weights in, twice; AdamW reads and writes three times what trains; gradients out and in.
    elements = 2 * sum(p.numel() for p in model.parameters())
    elements += 8 * sum(p.numel() for p in trained.values())
    elements *= torch.float32.itemsize // setting.dtype.itemsize
    return Case(
        functions={
            "fused": step_of(stage.loss(model)),
            "eager": on_reference(step_of(stage.loss(plain))),
            "dispatch": on_reference(step_of(stage.loss(dispatched))),
            # Gate noise from PyTorch's generator, as in the other implementations.
            "compile": step_of(compiled(stage.loss(plain), fallback_random=True)),
        },
        inputs=rotating(draw.setting, lambda: stage.input_set(shape, draw)),
        parameters=trained,
        constants=[*model.parameters(), *model.buffers()],
        floor=lambda: floors.floor_of(products_of(shape), elements, setting),
        finish=finish,
        by_part=True,
        truth=torch.float32,
    )


def test_step(report: Callable[..., None]) -> None:
    report(build)
