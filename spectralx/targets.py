"""Which layers of a model an adapter may take the place of: names, blocks, and what it must call.

Names are those of timm, transformers (4 and 5), torchvision and the published DINOv2, DINOv3 and
masked-autoencoder code.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx_kernels import Linear

Block = int | tuple[int, ...]

_MLP = (
    r"fc1(_[gx])?|fc2|linear_?[12]|pwconv[12]|w12|w[123]|mlp\.\d+|(gate|up|down)_proj"
    r"|intermediate\.dense|(?<!attention\.)output\.dense"
)
_ATTENTION = (
    r"qkv|query_key_value|q|kv|k|v|query|key|value|proj|([qkvo]|out)_proj|attention\.output\.dense"
)
_PATCHES = r"projection|patch_embeddings?"

MLP = rf"(^|\.)({_MLP})$"
"""The layers of a transformer's MLP."""
EVERYTHING = rf"(^|\.)({_MLP}|{_ATTENTION}|{_PATCHES})$"
"""The layers of MLP and attention, and the patch convolution."""

# Several projections in one layer, by the last part of its name.
_FUSED: Mapping[str, int] = {"qkv": 3, "query_key_value": 3, "kv": 2, "w12": 2}

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_NUMBER = re.compile(r"(?:^|_)(\d+)$")


def numbers_of(name: str) -> tuple[int, ...]:
    """The numbers in a dotted name: (1, 0) of ``layers.1.blocks.0.mlp.fc1``."""
    found = (_NUMBER.search(part) for part in name.split("."))
    return tuple(int(match[1]) for match in found if match)


def in_block(name: str, block: Block) -> bool:
    """Whether the numbers in a name begin with `block`."""
    numbers = (block,) if isinstance(block, int) else tuple(block)
    return numbers_of(name)[: len(numbers)] == numbers


def missing_blocks(names: Collection[str], blocks: Collection[Block]) -> list[Block]:
    """Those of `blocks` that none of the layers is in."""
    return [block for block in blocks if not any(in_block(name, block) for name in names)]


def fused_parts(name: str) -> int:
    """How many projections a layer of this name holds side by side: 3 of ``attn.qkv``."""
    return _FUSED.get(name.rpartition(".")[2], 1)


def check_called(name: str, layer: nn.Module, parent: nn.Module, *, by_weight: bool) -> None:
    """Raise where an adapter in the place of `layer` would be passed by, or pass something by.

    Parameters
    ----------
    name, parent : of the layer, for the error and for what reads it.
    by_weight : the adapter multiplies by the layer's weight itself instead of calling the layer.

    Raises
    ------
    ValueError : the parent reads the layer's weight without calling it, or the layer does more
        than its weight says and `by_weight`.
    """
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"targets: {name} is part of a nn.MultiheadAttention, which reads its weight without "
            "calling it; expected a layer that its model calls"
        )
    if isinstance(parent, nn.TransformerEncoderLayer):
        raise ValueError(
            f"targets: {name} is part of a nn.TransformerEncoderLayer, whose fast path reads its "
            "weight without calling it; expected a layer that its model calls"
        )
    if not by_weight:
        return
    plain = type(layer).forward in (nn.Linear.forward, Linear.forward)
    plain = plain and "forward" not in vars(layer)
    if not plain and not masks_bias(layer):
        raise ValueError(
            f"targets: {name} is a {type(layer).__name__} with a forward of its own, expected a "
            "plain nn.Linear for aomoa, or one whose bias_mask multiplies its bias"
        )
    if any(getattr(layer, hooks) for hooks in _HOOKS):
        raise ValueError(
            f"targets: {name} has hooks, which aomoa would not call; expected a layer without"
        )


def masks_bias(layer: nn.Module) -> bool:
    """Whether a linear layer is one but for its ``bias_mask``, as DINOv3's joint projection is.

    The mask multiplies the bias. What the layer says of two tokens shows that it does no more;
    without values (on the meta device) its names are taken for it.
    """
    mask = getattr(layer, "bias_mask", None)
    if not isinstance(layer, nn.Linear) or not isinstance(mask, Tensor) or "forward" in vars(layer):
        return False
    weight, bias = layer.weight, layer.bias
    if bias is None or mask.shape != bias.shape:
        return False
    if weight.is_meta:
        return True
    tokens = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=torch.float64)
    tokens = tokens.to(weight).unflatten(0, (2, -1))
    with torch.no_grad():
        expected = F.linear(tokens, weight, bias * mask.to(bias.dtype))
        return torch.allclose(layer(tokens), expected, equal_nan=True)
