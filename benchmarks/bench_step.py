"""One training step of stage 2: forward, loss, backward and AdamW, on the whole model.

Below float32 the step runs under autocast, on float32 weights. ``eager`` runs the reference
operators and a decoder that forms every upsampled map; ``dispatch`` is that with the per-expert
algorithm in every adapted layer; ``compile`` is ``torch.compile`` of it. Dropout is off and gate
noise is drawn from the same seed, so that implementations can be compared. Two images are the
least that UPerNet's batch statistics allow; see `use_running_statistics`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.case import Case, Draw, Setting, Tensors, rotating
from benchmarks.shapes import WAVELENGTHS, DecoderShape, HypertShape, StepShape
from benchmarks.variants import (
    compiled,
    on_reference,
    use_running_statistics,
    with_dispatch,
    with_plain_decoder,
)
from spectralx.segmentation import Segmentation


def model_of(shape: StepShape, draw: Draw) -> Segmentation:
    """The model of a step, in training mode."""
    model = Segmentation(
        shape.family,
        shape.bands,
        shape.classes,
        WAVELENGTHS[shape.sensor],
        image_size=shape.image_size,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        feature_blocks=shape.blocks,
        adapted_blocks=shape.blocks,
        dropout=0.0,
    )
    draw.fill(model).train()
    use_running_statistics(model.head)
    return model


def input_set(shape: StepShape, draw: Draw) -> Tensors:
    """Images and labels of a step."""
    size = (shape.batch, shape.bands, shape.image_size, shape.image_size)
    images = draw.normal(*size, scale=0.1) + draw.normal(*size[:2], 1, 1, scale=0.3, offset=0.5)
    labels = draw.integers(shape.classes, shape.batch, shape.image_size, shape.image_size)
    return images, labels


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as stage 2 runs it, on what trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a step timed in this dtype runs under autocast."""
    return dtype in (torch.bfloat16, torch.float16)


def build(shape: StepShape, mode: str, setting: Setting) -> Case:
    # Weights stay in float32; autocast rounds where the timed dtype is narrower.
    draw = Draw(Setting(setting.device, rotate=setting.rotate), seed=0)
    model = model_of(shape, draw)
    plain = with_plain_decoder(model)
    dispatched = with_dispatch(plain)

    narrow = is_narrow(setting.dtype)

    def step_of(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def run(images: Tensor, labels: Tensor) -> Tensor:
            with torch.autocast(setting.device, setting.dtype, enabled=narrow):
                loss = loss_of(images, labels)
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
    tokenizer = HypertShape(
        name="",
        batch=shape.batch,
        sensor=shape.sensor,
        image_size=shape.image_size,
        embed_dim=shape.embed_dim,
    )
    decoder = DecoderShape(
        name="",
        batch=shape.batch,
        classes=shape.classes,
        width=shape.embed_dim,
        side=shape.image_size // 16,
    )
    return Case(
        functions={
            "fused": step_of(model.loss),
            "eager": on_reference(step_of(plain.loss)),
            "dispatch": on_reference(step_of(dispatched.loss)),
            # Gate noise from PyTorch's generator, as in the other implementations.
            "compile": step_of(compiled(plain.loss, fallback_random=True)),
        },
        inputs=rotating(draw.setting, lambda: input_set(shape, draw)),
        parameters=trained,
        constants=[*model.parameters(), *model.buffers()],
        floor=lambda: floors.floor_of(floors.step(shape, tokenizer, decoder), elements, setting),
        finish=finish,
        by_part=True,
        truth=torch.float32,
    )


def test_step(report: Callable[..., None]) -> None:
    report(build)
