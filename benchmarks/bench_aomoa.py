"""AoMoA: the adapted linear layer.

``fwd`` is evaluation (no gate noise, no autograd); ``fwd+bwd`` is training, with gate noise, and
differentiates the input and the adapter; the linear layer is frozen. The floor is the frozen
layer's product and the low-rank ones. The frozen layer alone, as torch runs it on the same inputs,
is noted beside it (`linear_ms`), and its bare products on operands that are read again and again
(`linear_products_ms`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from benchmarks import dispatch, floors
from benchmarks.case import Case, Draw, Setting, Tensors, rotating
from benchmarks.shapes import FORWARD, AomoaShape
from spectralx_kernels import aomoa


def weights(shape: AomoaShape, draw: Draw) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Frozen and trained tensors of an adapted layer, none at a constant start value."""
    a, e, r, h = shape.attributes, shape.experts, shape.rank, shape.hidden
    d, out = shape.in_features // a, shape.out_features
    frozen = {
        "weight": draw.normal(out, shape.in_features, scale=shape.in_features**-0.5),
        "bias": draw.normal(out, scale=0.1),
    }
    trained = {
        "scaler": draw.normal(out, scale=0.1, offset=1.0),
        "norm1_weight": draw.normal(d, scale=0.1, offset=1.0),
        "norm1_bias": draw.normal(d, scale=0.1),
        "down": draw.normal(r, d, scale=d**-0.5),
        "norm2_weight": draw.normal(r, scale=0.1, offset=1.0),
        "norm2_bias": draw.normal(r, scale=0.1),
        "gate": draw.normal(a, r, e, scale=r**-0.5),
        "gate_noise": draw.normal(a, r, e, scale=r**-0.5),
        "fc1_weight": draw.normal(e, h, r, scale=r**-0.5),
        "fc1_bias": draw.normal(e, h, scale=0.1),
        "fc2_weight": draw.normal(e, r, h, scale=h**-0.5),
        "fc2_bias": draw.normal(e, r, scale=0.1),
        "up": draw.normal(out // a, r, scale=r**-0.5),
    }
    return frozen, trained


def build(shape: AomoaShape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)
    frozen, trained = weights(shape, draw)
    training = mode != FORWARD
    for tensor in trained.values():
        tensor.requires_grad_(training)

    def input_set() -> Tensors:
        x = draw.normal(shape.tokens, shape.in_features).requires_grad_(training)
        if not training:
            return (x,)
        return x, draw.normal(shape.attributes, shape.tokens, shape.experts, wide=True)

    def run(function: Callable[..., Any], x: Tensor, noise: Tensor | None = None) -> Tensor:
        result = function(x, **frozen, **trained, top_k=shape.top_k, noise=noise)
        return result if isinstance(result, Tensor) else result[0]

    # Forward reads x and the weights and writes the output; backward reads the output's gradient,
    # x and the weights, and writes the gradients of x and of the adapter.
    adapter = sum(tensor.numel() for tensor in trained.values())
    elements = shape.tokens * (shape.in_features + shape.out_features) + adapter
    elements += frozen["weight"].numel()
    if training:
        elements = 2 * elements + shape.tokens * shape.in_features + adapter

    def floor() -> floors.Floor:
        found = floors.floor_of(floors.aomoa(shape, mode), elements, setting)
        alone = [floors.linear(shape)]
        found["linear_products"] = floors.bare_products(
            floors.frozen(alone) if training else alone, setting
        )
        return found

    return Case(
        functions={
            "fused": partial(run, aomoa),
            "eager": partial(run, partial(aomoa, backend="eager")),
            "dispatch": partial(run, dispatch.aomoa),
        },
        inputs=rotating(setting, input_set),
        parameters=trained,
        constants=list(frozen.values()),
        floor=floor,
        linear=lambda x, *_: linear(x, frozen["weight"], frozen["bias"]),
    )


def test_aomoa(report: Callable[..., None]) -> None:
    report(build)
