from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx.linear_decoder import LinearDecoder
from spectralx.segmentation import Segmentation

BANDS = 5
SMALL: dict[str, Any] = {
    "family": "scalemae",
    "in_channels": BANDS,
    "num_classes": 4,
    "wavelengths": [0.45, 0.55, 0.65, 0.85, 1.6],
    "image_size": 32,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "stem_dim": 16,
    "tokenizer_heads": 2,
    "low_rank": 4,
    "neck_channels": 16,
    "head_channels": 8,
}
FAMILIES = ("scalemae", "satmae++", "dinov3")


def small(**options: Any) -> Segmentation:
    torch.manual_seed(0)
    return Segmentation(**{**SMALL, **options})


def batch(height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, BANDS, height, width, generator=generator)
    return images, torch.randint(0, 4, (2, height, width), generator=generator)


def trained(model: Segmentation) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reaches_every_trainable_parameter(family):
    model = small(family=family)
    images, labels = batch()
    model.loss(images, labels).backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    without = trained(model) - with_grad
    # What only chooses a match gets no gradient.
    assert all("match_attn" in name for name in without), without
    assert with_grad <= trained(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(family):
    model = small(family=family, image_size=(32, 48)).eval()
    images, _ = batch(32, 48)
    assert [tuple(x.shape) for x in model.features(images)] == [(2, 32, 2, 3)] * 4
    assert model(images).shape == (2, 4, 8, 12)
    assert model.predict(images).shape == (2, 32, 48)
    assert model.predict(images, (20, 30)).shape == (2, 20, 30)


def test_loss_is_cross_entropy_of_upsampled_logits():
    model = small().eval()
    images, labels = batch()
    logits = F.interpolate(model(images), size=(32, 32), mode="bilinear")
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    for options in ({}, {"weight": weight}, {"label_smoothing": 0.1}):
        expected = F.cross_entropy(logits, labels, ignore_index=0, **options)
        torch.testing.assert_close(model.loss(images, labels, **options), expected)
    expected = F.cross_entropy(logits, labels, ignore_index=2)
    torch.testing.assert_close(model.loss(images, labels, ignore_index=2), expected)
    assert torch.equal(model.predict(images), logits.argmax(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_precision(family):
    model = small(family=family).eval()
    images, labels = batch()
    exact = model.loss(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(images, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_what_trains_with_adapters():
    names = trained(small(adapted_blocks=[1]))
    backbone = {name for name in names if name.startswith("vit_backbone.")}
    assert "vit_backbone.patch_embed.proj.scaler" in names
    assert "vit_backbone.patch_embed.proj.down.weight" in names
    assert "vit_backbone.blocks.1.mlp.fc1.gate" in names
    assert "vit_backbone.blocks.0.norm1.weight" in names
    assert "AreApt.scale" in names
    assert "head.conv_seg.bias" in names
    assert not any(".proj.proj." in name or ".linear." in name for name in backbone)
    assert not any("attn" in name or name.endswith("cls_token") for name in backbone)
    assert not any(".blocks.0.mlp" in name for name in backbone)


def test_what_trains_otherwise():
    everything = {name for name, _ in small().named_parameters()}
    assert trained(small(trainable="all")) == everything
    decoder = {name for name in everything if not name.startswith("vit_backbone.")}
    assert trained(small(trainable="decoder")) == decoder
    frozen = small(adapter=None)
    assert trained(frozen) == {
        name for name, _ in frozen.named_parameters() if name.startswith(("neck.", "head."))
    }


@pytest.mark.parametrize("adapter", ["lora", "slr", "ia3"])
def test_baselines(adapter):
    model = small(adapter=adapter, adapted_blocks=[2])
    images, labels = batch()
    model.loss(images, labels).backward()
    added = {"lora": "down.weight", "slr": "out_scaler", "ia3": "in_scaler"}[adapter]
    names = trained(model)
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert f"vit_backbone.blocks.2.{layer}.{added}" in names
    assert any(name.startswith("vit_backbone.patch_embed.proj.") for name in names)
    assert "vit_backbone.patch_embed.proj.proj.weight" not in names
    assert "vit_backbone.blocks.2.mlp.fc1.linear.weight" not in names
    assert not any("blocks.1.mlp" in name for name in names)
    assert model.AreApt is None


def test_a_convolution_takes_other_patch_sizes():
    model = small(adapter=None, patch_size=4, image_size=16).eval()
    assert model(batch(16, 16)[0]).shape == (2, 4, 16, 16)


@pytest.mark.parametrize(("patch", "size", "side"), [(8, 32, 4), (4, 16, 4), (1, 8, 8)])
def test_the_whole_method_takes_other_patch_sizes(patch: int, size: int, side: int) -> None:
    model = small(patch_size=patch, image_size=size)
    assert model.grid == (side, side)
    images, labels = batch(size, size)
    assert model(images).shape == (2, 4, 4 * side, 4 * side)
    model.loss(images, labels).backward()
    low_rank = model.get_parameter("vit_backbone.patch_embed.proj.down.weight")
    assert low_rank.shape[-1] == min(patch, 4)
    assert low_rank.grad is not None
    assert low_rank.grad.abs().sum() > 0
    weights = dict(model.AreApt.named_parameters())  # type: ignore[union-attr]
    assert weights["refine_spa.0.weight"].grad is not None


def test_logits_have_the_size_of_the_finest_map() -> None:
    model = small(patch_size=2, image_size=16, depth=2, neck_scales=[1.0, 0.5]).eval()
    images, _ = batch(16, 16)
    assert model(images).shape == (2, 4, 8, 8)
    assert model.logits_size == (8, 8)
    assert Segmentation(**model.config)(images).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="one for each feature map, the largest first"):
        small(depth=2, neck_scales=[0.5, 1.0])


def test_the_linear_decoder_is_one_linear_layer_a_token() -> None:
    model = small(depth=4, decoder="linear", neck_channels=None).eval()
    images, labels = batch()
    features = torch.cat(model.features(images), dim=1)  # [2, 4 * 32, rows, columns]
    layer = model.head.conv_seg
    expected = torch.einsum("kd,bdhw->bkhw", layer.weight[:, :, 0, 0], features)
    expected = expected + layer.bias[:, None, None]  # type: ignore[index]
    torch.testing.assert_close(model(images), expected)
    assert model.logits_size == model.grid == tuple(expected.shape[2:])
    again = Segmentation(**model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))
    model.train().loss(images, labels).backward()
    assert layer.weight.grad is not None
    with pytest.raises(ValueError, match="decoder: got 'mlp', expected one of upernet, linear"):
        small(decoder="mlp")


def test_the_linear_decoder_with_a_kernel_adds_what_stands_around() -> None:
    plain = small(depth=2, decoder="linear").eval()
    model = small(depth=2, decoder="linear", decoder_kernel=3).eval()
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert found.missing_keys == ["head.neighbours.weight"]
    images, labels = batch()
    assert torch.equal(model(images), plain(images))  # the kernel starts at zero
    model.loss(images, labels).backward()
    assert isinstance(model.head, LinearDecoder)
    assert model.head.neighbours is not None
    weight = model.head.neighbours.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        weight.zero_()[:, 0, 1, 0] = 0.5  # half of the token on the left, at the border of itself
        x = torch.cat(model.features(images), dim=1)
        left = torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        expected = model.head.conv_seg(x + 0.5 * left)
    torch.testing.assert_close(model(images), expected)
    again = Segmentation(**model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))
    with pytest.raises(ValueError, match="kernel_size: got 2, expected an odd number"):
        small(decoder="linear", decoder_kernel=2)


def test_are_adapter_refines_what_the_next_block_sees():
    images, _ = batch()
    model = small().eval()
    assert model.AreApt is not None
    seen: list[Tensor] = []
    model.vit_backbone.blocks[1].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model.AreApt.scale.zero_()
        plain = model.features(images)
        model.AreApt.scale.fill_(1.0)
        refined = model.features(images)
    assert not torch.allclose(refined[0], plain[0])
    for features, tokens in zip((plain, refined), seen, strict=True):
        assert torch.equal(tokens[:, 1:], features[0].flatten(2).transpose(1, 2))
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])


def test_positions_differ_between_families():
    metres = small().state_dict()["vit_backbone.pos_embed"]
    patches = small(family="satmae++").state_dict()["vit_backbone.pos_embed"]
    assert metres.shape == patches.shape == (1, 5, 32)
    assert not torch.allclose(metres, patches)


def test_config_builds_the_same_model():
    model = small(family="dinov3", feature_blocks=(1, 3), adapter_options={"experts": 3})
    again = Segmentation(**json.loads(json.dumps(model.config)))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes
    again.load_state_dict(model.state_dict())
    images, _ = batch()
    assert torch.equal(model.eval()(images), again.eval()(images))


@pytest.mark.parametrize(
    ("depth", "expected"), [(24, [5, 11, 17, 23]), (4, [0, 1, 2, 3]), (2, [0, 1]), (1, [0])]
)
def test_default_feature_blocks(depth, expected):
    model = small(depth=depth, adapter=None)
    assert model.feature_blocks == expected
    assert model.eval()(batch()[0]).shape == (2, 4, 8, 8)


def test_it_learns():
    """Bright images from dark ones, at labelled pixels only."""
    model = small(trainable="all", dropout=0.0)
    images, labels = batch()
    images[1] += 1.0
    labels[0], labels[1] = 1, 2
    labels[:, ::2] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)
    losses = []
    for _ in range(8):
        loss = model.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "mae"}, "family: got 'mae', expected one of scalemae, satmae"),
        ({"trainable": "some"}, "trainable: got 'some'"),
        ({"tokenizer": "patch"}, "tokenizer: got 'patch'"),
        ({"image_size": 40}, "image_size: got 40, expected positive multiples of patch_size 16"),
        ({"patch_size": 6, "image_size": 24}, "patch_size: got 6, expected 1, 2 or a multiple"),
        ({"wavelengths": None}, "wavelengths: got None"),
        ({"wavelengths": [0.5]}, "wavelengths: got shape"),
        ({"tokenizer": "conv", "refine": True}, "refine: got True, expected False"),
        ({"feature_blocks": [3, 1]}, r"feature_blocks: got \[3, 1\], expected one to four"),
        ({"feature_blocks": [0, 1, 2, 4]}, "below depth 4"),
        ({"feature_blocks": []}, r"feature_blocks: got \[\]"),
        ({"num_heads": 5}, "num_heads: got 5"),
        ({"adapter": "moe"}, "method: got 'moe'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (2, BANDS, 32, 48), (BANDS, 32, 32)])
def test_images_of_another_shape(shape):
    expected = rf"images: got shape .*, expected \[batch, {BANDS}, 32, 32\]"
    with pytest.raises(ValueError, match=expected):
        small()(torch.zeros(shape))
