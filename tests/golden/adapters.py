"""The baselines' layers: LoRA, SLR and IA3 on a linear layer and on a patch convolution."""

from __future__ import annotations

from torch import nn

from spectralx.adapters import IA3Linear, LoRAConv2d, LoRALinear, SLRConv2d, SLRLinear
from tests.golden.golden import Arrays, Golden


def _layer(golden: Golden) -> nn.Module:
    meta = golden.meta
    rank = meta["hidden_dim"]
    if meta["conv"]:
        patch = golden.meta["params"]["proj.weight"]["shape"][2:]
        conv = nn.Conv2d(meta["in_features"], meta["out_features"], patch, patch)
        wrap = {"LowRankConvAdapter": LoRAConv2d, "ScaledLowRankConvAdapter": SLRConv2d}
        return wrap[meta["module"]](conv, rank=rank)
    linear = nn.Linear(meta["in_features"], meta["out_features"])
    if meta["module"] == "ScalingAdapter":
        return IA3Linear(linear)
    return {"LowRankAdapter": LoRALinear, "ScaledLowRankAdapter": SLRLinear}[meta["module"]](
        linear, rank=rank
    )


def run(golden: Golden) -> Arrays:
    layer = _layer(golden)
    layer.load_state_dict(golden.state_dict())
    x = golden.input("x").requires_grad_()
    y = layer(x)
    (y * golden.input("gy")).sum().backward()
    return {"y": y, "dx": x.grad, **golden.gradients(layer)}


HANDLERS = dict.fromkeys(
    (
        "LowRankConvAdapter",
        "LowRankAdapter",
        "ScaledLowRankConvAdapter",
        "ScaledLowRankAdapter",
        "ScalingAdapter",
    ),
    run,
)
