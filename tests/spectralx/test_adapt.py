"""`adapt` and `freeze` on transformers of several makers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectralx import adapt, adapter_blocks, freeze, trainable_parameters, unadapt
from spectralx.adapt import METHODS, Method
from spectralx.adapters import IA3Linear, LoRALinear, SLRConv2d, SLRLinear
from spectralx.backbones.dinov3 import RotaryAttention
from spectralx.backbones.vit import Block
from spectralx_kernels import AoMoALinear, HyperT

KINDS = {"aomoa": AoMoALinear, "lora": LoRALinear, "slr": SLRLinear, "ia3": IA3Linear}


class ToyViT(nn.Module):
    """A vision transformer in timm's names."""

    def __init__(self, depth: int = 3, dim: int = 32) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, dim, 8, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.bn = nn.BatchNorm1d(dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


@pytest.fixture
def model() -> ToyViT:
    torch.manual_seed(0)
    return ToyViT()


def test_aomoa_goes_onto_the_mlp_of_the_chosen_blocks(model: ToyViT) -> None:
    before = copy.deepcopy(model)
    replaced = adapt(model, method="aomoa", blocks=[0, 2], experts=3, top_k=1)
    assert replaced.names == (
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "blocks.2.mlp.fc1",
        "blocks.2.mlp.fc2",
    )
    for name in replaced.names:
        layer = model.get_submodule(name)
        assert isinstance(layer, AoMoALinear)
        assert (layer.experts, layer.top_k) == (3, 1)
        torch.testing.assert_close(layer.linear.weight, before.get_submodule(name).weight)
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in before.parameters())
    assert replaced.parameters == count
    assert "aomoa on 4 layers" in str(replaced)
    assert f"{count:,} parameters added" in str(replaced)
    assert isinstance(model.get_submodule("blocks.1.mlp.fc1"), nn.Linear)


@pytest.mark.parametrize("method", ["lora", "slr", "ia3"])
def test_baselines_keep_the_output_of_the_model(model: ToyViT, method: Method) -> None:
    images = torch.randn(2, 3, 16, 24)
    expected = model(images)
    replaced = adapt(model, method=method)
    assert len(replaced.names) == 3 * 4 + 1
    kinds = {type(model.get_submodule(name)) for name in replaced.names[1:]}
    assert kinds == {KINDS[method]}
    torch.testing.assert_close(model(images), expected)


def test_patch_convolutions_take_the_convolution_adapters(model: ToyViT) -> None:
    adapt(model, method="slr", targets=r"^patch_embed\.proj$", rank=2)
    layer = model.get_submodule("patch_embed.proj")
    assert type(layer) is SLRConv2d
    assert layer.down.weight.shape == (2, 3, 2, 2)
    assert layer.up.weight.shape == (32, 2, 4, 4)


def test_adapted_layers_are_left_alone(model: ToyViT) -> None:
    adapt(model, method="lora", targets="fc1$")
    replaced = adapt(model, method="lora", targets="fc1|fc2|linear")
    assert replaced.names == tuple(f"blocks.{i}.mlp.fc2" for i in range(3))
    with pytest.raises(ValueError, match=r"adapted already, blocks\.0\.mlp\.fc1 the first"):
        adapt(model, method="ia3", targets="fc1")


def test_shared_layers_stay_shared(model: ToyViT) -> None:
    model.blocks[2].mlp = model.blocks[0].mlp
    adapt(model, method="lora", targets="fc1$")
    first, last = (model.get_submodule(f"blocks.{i}.mlp.fc1") for i in (0, 2))
    assert isinstance(first, LoRALinear)
    assert first is last
    twin = nn.ModuleDict({"a": model.head, "b": model.head})
    replaced = adapt(twin, method="lora", targets="[ab]")
    assert twin["a"] is twin["b"]
    assert replaced.names == ("a", "b")
    assert replaced.parameters == 16 * (32 + 5) + 16 + 5


def test_layers_of_sequentials_and_eval_mode(model: ToyViT) -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    replaced = adapt(layers, method="lora", targets="2")
    assert replaced.names == ("2",)
    assert isinstance(layers[2], LoRALinear)
    assert not any(module.training for module in layers.modules())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"method": "dora"}, "method: got 'dora', expected one of aomoa, lora, slr, ia3"),
        ({"method": "lora", "targets": "query"}, "targets: 'query' matches no"),
        ({"method": "lora", "blocks": []}, r"in blocks \[\] of ToyViT"),
        ({"method": "aomoa", "blocks": [1, 5, 7]}, r"blocks: got \[5, 7\], which hold no layer"),
        ({"method": "lora", "targets": "head", "blocks": [0]}, "matches no"),
        ({"method": "aomoa", "targets": "patch_embed"}, "patch_embed.proj is a convolution"),
        ({"method": "aomoa", "targets": "head"}, "attributes: got 2"),
    ],
)
def test_errors(model: ToyViT, arguments: dict, names: str) -> None:
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=names):
        adapt(model, **arguments)
    assert [name for name, _ in model.named_modules()] == before


class Doubled(nn.Linear):
    """Does more than its weight and bias say."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_aomoa_refuses_a_linear_layer_with_another_forward() -> None:
    attention = nn.ModuleDict({"attn": RotaryAttention(16, 2)})
    attention["attn"].qkv = Doubled(16, 48)
    with pytest.raises(ValueError, match=r"attn\.qkv is a Doubled with a forward of its own"):
        adapt(attention, method="aomoa", targets="qkv")
    # A mask beside it does not make it a layer that only masks its bias.
    attention["attn"].qkv.register_buffer("bias_mask", torch.ones(48))
    with pytest.raises(ValueError, match=r"attn\.qkv is a Doubled with a forward of its own"):
        adapt(attention, method="aomoa", targets="qkv")
    adapt(attention, method="lora", targets="qkv")
    assert isinstance(attention["attn"].qkv, LoRALinear)


def test_aomoa_on_the_key_masked_projection_of_dinov3() -> None:
    """As on a plain layer whose bias is zero in the key third from the start."""
    attention: Any = nn.ModuleDict({"attn": RotaryAttention(16, 2)})
    nn.init.normal_(attention["attn"].qkv.bias)
    before = copy.deepcopy(attention.state_dict())
    plain: Any = nn.ModuleDict({"attn": RotaryAttention(16, 2, mask_key_bias=False)})
    weights = {name: tensor for name, tensor in before.items() if not name.endswith("bias_mask")}
    plain.load_state_dict(weights)
    plain["attn"].qkv.bias.data[16:32] = 0
    for model in (attention, plain):
        torch.manual_seed(1)
        assert "of 3 parts" in str(adapt(model, method="aomoa", targets="qkv"))
    x = torch.randn(2, 5, 16)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for model, results in ((attention, found), (plain, expected)):
        torch.manual_seed(2)  # the gates' noise
        out = model["attn"](x)
        out.square().mean().backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        results += [out, *trained]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    unadapt(attention)
    after = attention.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("depth", "blocks"), [(24, [5, 11, 17, 23]), (12, [5, 11]), (6, [5]), (7, [5]), (4, [3])]
)
def test_adapter_blocks(depth: int, blocks: list[int]) -> None:
    assert adapter_blocks(depth) == blocks


@pytest.mark.parametrize("method", METHODS)
def test_freeze_leaves_adapters_and_norms(model: ToyViT, method: Method) -> None:
    model.requires_grad_(True)
    adapt(model, method=method, blocks=[1])
    names = set(freeze(model))
    adapters = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("blocks.1.")
        and any(part in name for part in ("scaler", "down", "up", "gate", "fc1_", "fc2_", "norm"))
    }
    norms = {n for n, _ in model.named_parameters() if "norm" in n}
    assert names == adapters | norms
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert not any(n.endswith("linear.weight") for n in names)


def test_freeze_without_norms_and_with_kept_names(model: ToyViT) -> None:
    assert freeze(model, norms=False) == []
    assert freeze(model, norms=False, keep=r"^(cls_token|head\.)") == [
        "cls_token",
        "head.weight",
        "head.bias",
    ]


@pytest.mark.parametrize("trainable", ["official", "all"])
def test_freeze_leaves_hypert_as_it_is(trainable: str) -> None:
    tokenizer = HyperT(
        3, [0.5, 0.6, 0.7], embed_dim=16, image_size=32, stem_dim=16, trainable=trainable
    )
    holder = nn.ModuleDict({"proj": tokenizer})
    before = {name: p.requires_grad for name, p in holder.named_parameters()}
    freeze(holder)
    assert {name: p.requires_grad for name, p in holder.named_parameters()} == before
    with pytest.raises(ValueError, match="matches no"):
        adapt(holder, method="lora", targets="fc1")


def states(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_unadapt_gives_the_model_back(model: ToyViT, method: Method) -> None:
    model.blocks[2].mlp = model.blocks[0].mlp
    model.blocks[0].attn.requires_grad_(False)
    model.eval()
    images = torch.randn(2, 3, 16, 24)
    before, output = states(model), model(images)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    replaced = adapt(model, method=method)
    assert not any(layer.weight.requires_grad for layer in map(model.get_submodule, replaced.names))
    model = copy.deepcopy(model)
    assert unadapt(model) == list(replaced.names)
    assert unadapt(model) == []
    after = states(model)
    assert after.keys() == before.keys()
    for name, (value, trains) in before.items():
        assert torch.equal(after[name][0], value)
        assert after[name][1] == trains, name
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == modules
    assert torch.equal(model(images), output)
    assert model.get_submodule("blocks.2.mlp.fc1") is model.get_submodule("blocks.0.mlp.fc1")
    assert adapt(model, method=method).names == replaced.names


def test_unadapt_leaves_the_mode_of_the_layer(model: ToyViT) -> None:
    adapt(model, method="lora", targets="fc1$")
    model.eval()
    unadapt(model)
    assert not any(module.training for module in model.modules())


def test_trainable_parameters(model: ToyViT) -> None:
    model.blocks[2].mlp = model.blocks[0].mlp
    replaced = adapt(model, method="lora", targets="fc1$")
    freeze(model, norms=False)
    trainable = trainable_parameters(model)
    assert sum(p.numel() for p in trainable) == replaced.parameters
    assert len({id(p) for p in trainable}) == len(trainable) == 2 * 4
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="got a ToyViT that is frozen"):
        trainable_parameters(model)


def test_the_report_is_a_table(model: ToyViT) -> None:
    lines = str(adapt(model, method="lora", blocks=[1], rank=2)).splitlines()
    assert lines[0].startswith("lora on 4 layers, ")
    assert " ".join(lines[1].split()) == "blocks.1.attn.qkv Linear 32 -> 96 LoRALinear 354"
    assert len({len(line) for line in lines[1:]}) == 1
    patch = str(adapt(model, method="ia3", targets="patch_embed"))
    assert "patch_embed.proj  Conv2d 3 -> 32, 8x8  IA3Conv2d  3" in patch


def test_blocks_of_a_hierarchy() -> None:
    stages = nn.ModuleList(nn.ModuleList(Block(16, 2) for _ in range(2)) for _ in range(3))
    model = nn.ModuleDict({"stages": stages})
    replaced = adapt(model, method="lora", targets="fc1$", blocks=[0, (2, 1)])
    assert replaced.names == ("stages.0.0.mlp.fc1", "stages.0.1.mlp.fc1", "stages.2.1.mlp.fc1")
    with pytest.raises(ValueError, match=r"blocks: got \[\(1, 2\)\], which hold no layer"):
        adapt(model, method="lora", targets="fc1$", blocks=[(1, 1), (1, 2)])


def test_blocks_with_the_number_in_their_name() -> None:
    layers = {f"encoder_layer_{i}": nn.Sequential(nn.Linear(4, 4)) for i in range(3)}
    assert adapt(nn.ModuleDict(layers), method="lora", targets="0$", blocks=[2]).names == (
        "encoder_layer_2.0",
    )


def test_a_fused_layer_gets_its_parts(model: ToyViT) -> None:
    replaced = adapt(model, method="aomoa", targets="qkv|proj$|fc1", blocks=[1])
    parts = {name: model.get_submodule(name).parts for name in replaced.names}
    assert parts == {"blocks.1.attn.qkv": 3, "blocks.1.attn.proj": 1, "blocks.1.mlp.fc1": 1}
    assert "AoMoALinear of 3 parts" in str(replaced)
    adapt(model, method="aomoa", targets="qkv", blocks=[2], parts=1)
    assert model.get_submodule("blocks.2.attn.qkv").parts == 1
    model(torch.randn(2, 3, 16, 24)).sum().backward()
    scaler = model.get_parameter("blocks.1.attn.qkv.scaler")
    assert scaler.grad is not None
    assert scaler.grad.abs().sum() > 0


class ReadsWeights(nn.Module):
    """Multiplies by the weight of its second layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.dropout(self.first(x) @ self.second.weight.T) * scale
        return out


@pytest.mark.parametrize("example", ["tensor", "arguments", "keywords"])
def test_an_example_finds_layers_that_are_not_called(example: str) -> None:
    model = ReadsWeights()
    model.dropout.eval()
    x = torch.randn(2, 4)
    inputs: Any = {"tensor": x, "arguments": (x, 2.0), "keywords": {"x": x, "scale": 2.0}}[example]
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="ReadsWeights does not call second on the example"):
        adapt(model, method="lora", targets="first|second", example=inputs)
    assert all(type(layer) is nn.Linear for layer in (model.first, model.second))
    assert all(p.requires_grad for p in model.parameters())
    assert adapt(model, method="lora", targets="first", example=inputs).names == ("first",)
    assert [m.training for m in model.modules() if isinstance(m, (nn.Dropout, ReadsWeights))] == [
        modes[0],
        False,
    ]
    assert not model.first._forward_pre_hooks


def test_layers_that_are_read_and_not_called_are_refused() -> None:
    layer = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(16, 2, 32)})
    with pytest.raises(ValueError, match=r"out_proj is part of a nn\.MultiheadAttention"):
        adapt(layer, method="lora", targets="out_proj")
    with pytest.raises(ValueError, match=r"linear1 is part of a nn\.TransformerEncoderLayer"):
        adapt(layer, method="aomoa")
    assert all(p.requires_grad for p in layer.parameters())


def test_aomoa_refuses_what_it_would_pass_by(model: ToyViT) -> None:
    layer = model.get_submodule("blocks.1.mlp.fc2")
    handle = layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2 has hooks"):
        adapt(model, method="aomoa")
    assert all(p.requires_grad for p in model.parameters())
    handle.remove()
    layer.forward = lambda x: x
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2 is a Linear with a forward of its"):
        adapt(model, method="aomoa")


@pytest.mark.parametrize(
    ("method", "option"), [("aomoa", "rang"), ("lora", "top_k"), ("ia3", "rank")]
)
def test_unknown_options_are_named_and_change_nothing(method, option):
    model = nn.Sequential(nn.Linear(8, 8))
    options: dict[str, Any] = {option: 2}
    with pytest.raises(ValueError, match=f"options of {method}: got '{option}', expected"):
        adapt(model, method=method, targets="0", **options)
    assert type(model[0]) is nn.Linear
