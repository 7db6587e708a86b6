"""The transformer block, against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralx.backbones.vit import Attention, Block


def attention_by_hand(layer: Attention, x: Tensor) -> Tensor:
    dim = x.shape[-1]
    width = dim // layer.num_heads
    query, key, value = (x @ layer.qkv.weight.T + layer.qkv.bias).split(dim, dim=-1)
    heads = []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        heads.append(scores.softmax(-1) @ value[..., part])
    return torch.cat(heads, dim=-1) @ layer.proj.weight.T + layer.proj.bias


def test_block_is_pre_norm_attention_and_mlp() -> None:
    torch.manual_seed(0)
    block = Block(24, 3, mlp_ratio=2.0).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 24, dtype=torch.float64)

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return F.layer_norm(x, (24,), layer.weight, layer.bias, 1e-6)

    after = x + attention_by_hand(block.attn, norm(x, block.norm1))
    normed = norm(after, block.norm2)
    hidden = F.gelu(normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    expected = after + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(block(x), expected)


def test_names_are_those_of_timm() -> None:
    names = {name.rpartition(".")[0] for name in Block(8, 2).state_dict()}
    assert names == {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_divide_the_width(heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads: got {heads}, expected a divisor of dim=24"):
        Attention(24, heads)
