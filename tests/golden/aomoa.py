"""Golden files of the adapted linear layer."""

from __future__ import annotations

from torch import nn

from spectralx_kernels import AoMoALinear
from tests.golden.golden import Arrays, Golden


def run(golden: Golden) -> Arrays:
    meta = golden.meta
    layer = AoMoALinear(
        nn.Linear(meta["in_features"], meta["out_features"]),
        experts=meta["num_experts"],
        top_k=meta["top_k"],
    )
    layer.load_state_dict(golden.state_dict())
    layer.train(meta["train"])
    x = golden.input("x").requires_grad_()
    tokens = x.numel() // x.shape[-1]
    with golden.gate_noise():
        noise = layer.draw_noise(tokens, x) if meta["train"] else None
    y, gates, load = layer.forward_with_routing(x, noise)
    y.backward(golden.input("gy"))
    assert x.grad is not None
    found: Arrays = {"y": y, "dx": x.grad, **golden.gradients(layer)}
    for attribute in range(layer.attributes):
        found[f"gates{attribute}"] = gates[attribute]
        found[f"load{attribute}"] = load[attribute]
        if noise is not None:
            found[f"noise{attribute}"] = noise[attribute]
    return found


HANDLERS = {"AoMoA linear": run}
