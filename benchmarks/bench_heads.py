"""Stage 1's prediction heads: from the decoder's tokens to what the losses score.

SatMAE++: the patches and the learned upsampling of their image, all of which trains. ScaleMAE: the
pyramid and both heads, whose last layers train. ``eager`` is the modules one after another.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import floors
from benchmarks.case import Case, Draw, Setting, Tensors, rotating
from benchmarks.shapes import FORWARD, TOKENS, TRAINING, WAVELENGTHS, HeadShape
from benchmarks.variants import with_plain_head
from spectralx.reconstruction import MaskedReconstruction

WIDTH = 512  # of a decoder's token


def build(shape: HeadShape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)
    model = MaskedReconstruction(
        shape.family,
        in_channels=shape.bands,
        wavelengths=WAVELENGTHS[shape.sensor],
        adapter="lora",
        image_size=shape.image_size,
        embed_dim=64,
        depth=1,
        num_heads=1,
        adapted_blocks=(0,),
        decoder_depth=1,
    )
    draw.fill(model)
    parts = ("fpn", "fcn_high", "fcn_low", "decoder_pred", "proj_up_conv", "up_block")
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith((*parts, "proj_up_norm"))
    }
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def input_set() -> Tensors:
        tokens = TOKENS if shape.family == "scalemae" else TOKENS + 1
        values: Tensor = draw.normal(shape.batch, tokens, WIDTH)
        return (values.requires_grad_(mode != FORWARD),)

    # Tokens in and images out, of 2H x 2W and of H x W; the way back once more.
    elements = shape.batch * (TOKENS * WIDTH + 5 * shape.bands * shape.image_size**2)
    elements += sum(parameter.numel() for parameter in named.values())
    products = floors.scalemae_head if shape.family == "scalemae" else floors.satmaepp_head
    return Case(
        functions={"fused": model.predict, "eager": with_plain_head(model).predict},
        inputs=rotating(setting, input_set),
        parameters=trained if mode == TRAINING else {},
        constants=list(model.parameters()),
        floor=lambda: floors.floor_of(
            products(shape, mode), elements * (3 if mode == TRAINING else 1), setting
        ),
        by_part=True,
    )


def test_heads(report: Callable[..., None]) -> None:
    report(build)
