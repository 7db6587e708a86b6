"""`adapt` on vision transformers as their makers build them: transformers, and timm where it is."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectralx import adapt, freeze, trainable_parameters, unadapt
from spectralx.adapt import METHODS, Method

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "num_channels": 4,
}
SWIN: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
    "num_channels": 4,
}
# Kind of model, and what its configuration is made of.
MAKERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", {**SIZES, "intermediate_size": 64}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**SIZES, "mlp_ratio": 2}),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {**SIZES, "use_swiglu_ffn": True}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**SIZES, "intermediate_size": 64}),
    "swin": ("SwinModel", "SwinConfig", SWIN),
}


def made(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, config, sizes = MAKERS[kind]
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    return built.eval()


def images() -> Tensor:
    return torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def output(model: nn.Module) -> Tensor:
    hidden: Tensor = model(images()).last_hidden_state
    return hidden


def aomoa_parameters(layer: nn.Linear, experts: int = 4) -> int:
    """What the paper's mixture adds to a linear layer, counted by hand."""
    d, half = layer.in_features // 2, layer.out_features // 2
    r, h = d // 4, max(d // 32, 1)
    experts_of = experts * (h * r + h + r * h + r)
    return layer.out_features + 2 * d + r * d + 2 * r + 2 * 2 * r * experts + experts_of + half * r


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_of_transformers(kind: str, method: Method) -> None:
    model = made(kind)
    before, state = output(model).detach(), copy.deepcopy(model.state_dict())
    layers = dict(model.named_modules())
    replaced = adapt(model, method=method, example=images())

    expected = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    mlp = {name for name in expected if ".mlp." in name}
    patches = {name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    outside = {name for name in expected if "downsample" in name or "pooler" in name}
    wanted = mlp if method == "aomoa" else (expected | patches) - outside
    assert set(replaced.names) == wanted
    if method == "aomoa":
        assert replaced.parameters == sum(aomoa_parameters(layers[name]) for name in mlp)
    else:
        torch.testing.assert_close(output(model), before)

    trainable = freeze(model, norms=False)
    assert sum(p.numel() for p in trainable_parameters(model)) == replaced.parameters
    output(model.train()).square().mean().backward()
    with_grad = [name for name, p in model.named_parameters() if p.grad is not None]
    # In training the gates see noise, so nothing of an adapter is left out.
    assert with_grad == trainable

    unadapt(model.eval())
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    # Not to the bit: what trains decides which attention kernel runs.
    torch.testing.assert_close(output(model), before)


def test_a_stage_of_swin() -> None:
    model = made("swin")
    replaced = adapt(model, method="aomoa", blocks=[(1, 0)])
    assert len(replaced.names) == 2
    assert all(".1.blocks.0.mlp." in name for name in replaced.names)


def test_an_adapted_model_compiles() -> None:
    model = made("vit")
    adapt(model, method="aomoa", blocks=[1])
    adapt(model, method="lora", targets=r"(q|v)_proj$|query$|value$", blocks=[1])
    freeze(model, norms=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(images()).last_hidden_state.square().mean()
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    torch.testing.assert_close(grads[1], grads[0])


def test_a_model_is_adapted_after_it_was_compiled() -> None:
    model = made("vit")
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = compiled(images()).last_hidden_state
        adapt(compiled, method="aomoa", blocks=[1])
        after = compiled(images()).last_hidden_state
        torch.testing.assert_close(after, output(model))
    assert not torch.allclose(after, before)


def test_a_new_head_trains_with_the_adapters() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(**SIZES, intermediate_size=64, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    adapt(model, method="aomoa", blocks=[1])
    names = freeze(model, keep=r"^classifier\.")
    assert {"classifier.weight", "classifier.bias"} < set(names)
    assert any(re.search(r"layernorm", name) for name in names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_model_of_timm(name: str, method: Method) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    swin: dict[str, Any] = {"embed_dim": 24, "depths": (1, 1), "window_size": 4}
    sizes = swin if name.startswith("swin") else {"embed_dim": 24, "depth": 2}
    torch.manual_seed(0)
    heads = {"num_heads": (3, 3)} if swin is sizes else {"num_heads": 3}
    model = timm.create_model(name, img_size=32, in_chans=4, num_classes=3, **sizes, **heads).eval()
    expected = model(images())
    replaced = adapt(model, method=method, example=images())
    linear = [n for n in replaced.names if n.endswith(("qkv", "proj", "fc1", "fc2"))]
    per_block = 2 if method == "aomoa" else 4
    assert len(linear) == len(replaced.names) == 2 * per_block + (method != "aomoa")
    if method != "aomoa":
        torch.testing.assert_close(model(images()), expected)
    unadapt(model)
    assert torch.equal(model(images()), expected)


def test_timm_reads_the_weight_of_qkv_in_beit() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "img_size": 32, "in_chans": 4}
    model = timm.create_model("beit_base_patch16_224", num_classes=3, **sizes).eval()
    with pytest.raises(ValueError, match=r"does not call blocks\.0\.attn\.qkv on the example"):
        adapt(model, method="lora", targets="qkv|proj$", example=images())
    adapt(model, method="lora", targets="attn.proj$|fc[12]$", example=images())
