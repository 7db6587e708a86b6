"""LoRA, SLR and IA3 layers; tests/golden holds them against the published numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spectralx.adapters import (
    IA3Conv2d,
    IA3Linear,
    LoRAConv2d,
    LoRALinear,
    SLRConv2d,
    SLRLinear,
)

LINEAR = [LoRALinear, SLRLinear, IA3Linear]
CONVOLUTION = [LoRAConv2d, SLRConv2d, IA3Conv2d]


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter)


@pytest.mark.parametrize("adapter", LINEAR)
@pytest.mark.parametrize("bias", [True, False])
def test_new_linear_adapter_changes_nothing_and_freezes(
    adapter: Callable[..., nn.Module], bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 10, bias=bias)
    x = torch.randn(2, 3, 6)
    expected = linear(x)
    adapted = adapter(linear)
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=0)
    frozen = {name for name, p in adapted.named_parameters() if not p.requires_grad}
    assert frozen == {f"linear.{name}" for name, _ in linear.named_parameters()}


@pytest.mark.parametrize("adapter", CONVOLUTION)
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (8, 4), (7, 7), (1, 1)])
def test_new_convolution_adapter_changes_nothing_and_freezes(
    adapter: Callable[..., nn.Module], patch: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, patch, patch)
    x = torch.randn(2, 3, 2 * patch[0], 3 * patch[1])
    expected = conv(x)
    adapted = adapter(conv)
    randomise_down = getattr(adapted, "down", nn.Identity())
    randomise(randomise_down)
    assert expected.shape == (2, 5, 2, 3)
    torch.testing.assert_close(adapted(x), expected, rtol=0, atol=0)
    frozen = {name for name, p in adapted.named_parameters() if not p.requires_grad}
    assert frozen == {"proj.weight", "proj.bias"}


def test_linear_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64)

    def low_rank(layer: LoRALinear, x: Tensor) -> Tensor:
        down = x @ layer.down.weight.T + layer.down.bias
        return down @ layer.up.weight.T + layer.up.bias

    for adapter in LINEAR:
        linear = nn.Linear(6, 10, dtype=torch.float64)
        layer = adapter(linear)
        randomise(layer)
        scaled = x * layer.in_scaler if hasattr(layer, "in_scaler") else x
        expected = scaled @ linear.weight.T + linear.bias
        if isinstance(layer, LoRALinear):
            expected = expected + low_rank(layer, scaled)
        if isinstance(layer, SLRLinear):
            expected = layer.out_scaler * expected
        torch.testing.assert_close(layer(x), expected)


def test_low_rank_patch_path_sees_one_patch_alone() -> None:
    """What the low-rank path adds to a token depends on that token's patch only."""
    torch.manual_seed(0)
    layer = LoRAConv2d(nn.Conv2d(2, 4, 6, 6), rank=3)
    randomise(layer)
    x = torch.randn(1, 2, 12, 12)
    other = x.clone()
    other[:, :, 6:, 6:] += 1.0
    differs = (layer(other) != layer(x)).any(1)[0]
    assert differs.tolist() == [[False, False], [False, True]]


def test_adapters_answer_for_the_layer() -> None:
    linear, conv = nn.Linear(4, 6, bias=False), nn.Conv2d(2, 4, 4, 4)
    for adapter in LINEAR:
        layer = adapter(linear)
        assert layer.weight is linear.weight
        assert layer.bias is None
        assert (layer.in_features, layer.out_features) == (4, 6)
    for adapter in CONVOLUTION:
        layer = adapter(conv)
        assert layer.weight is conv.weight
        assert layer.bias is conv.bias


def test_adapters_take_dtype_of_the_layer() -> None:
    for adapter in LINEAR:
        layer = adapter(nn.Linear(4, 4, dtype=torch.bfloat16))
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    for adapter in CONVOLUTION:
        layer = adapter(nn.Conv2d(2, 4, 4, 4, dtype=torch.float64))
        assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_is_checked(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank: got {rank}"):
        LoRALinear(nn.Linear(4, 4), rank=rank)
    with pytest.raises(ValueError, match=f"rank: got {rank}"):
        LoRAConv2d(nn.Conv2d(2, 4, 4, 4), rank=rank)


@pytest.mark.parametrize(
    "changes", [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 2}, {"padding": "same"}]
)
def test_only_patch_convolutions_take_a_low_rank_path(changes: dict) -> None:
    arguments = {"kernel_size": 4, "stride": 4, **changes}
    if changes.get("padding") == "same":
        arguments["stride"] = 1
    with pytest.raises(ValueError, match="expected a patch convolution"):
        LoRAConv2d(nn.Conv2d(2, 4, **arguments))
