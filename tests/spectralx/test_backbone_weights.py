"""Public weights of backbones, by the names of their files, into models of both stages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx import adapt
from spectralx.checkpoints import CheckpointError, initialise_backbone
from spectralx.checkpoints.reading import sha256_of
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation
from tests.spectralx.public_files import (
    DECODER,
    DEPTH,
    WIDTH,
    dinov3,
    mae,
    satmaepp,
    satmaepp_groups,
    scalemae,
    timm_dinov3,
    transformers_dinov3,
    vit,
)

RGB = [0.64, 0.55, 0.47]
FOUR = [0.47, 0.55, 0.64, 0.85]


def stage2(family: str, **options: Any) -> Segmentation:
    arguments: dict[str, Any] = {
        "in_channels": len(options.get("wavelengths") or FOUR),
        "num_classes": 3,
        "wavelengths": FOUR,
        "image_size": 224,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "stem_dim": 8,
        "tokenizer_heads": 2,
        "neck_channels": 8,
        "head_channels": 8,
        "adapted_blocks": [5],
    }
    return Segmentation(family, **{**arguments, **options})  # type: ignore[arg-type]


def stage1(family: str, **options: Any) -> MaskedReconstruction:
    arguments: dict[str, Any] = {
        "in_channels": len(options.get("wavelengths") or FOUR),
        "wavelengths": FOUR,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 2,
        "decoder_embed_dim": DECODER,
        "decoder_num_heads": 2,
        "fcn_dim": 8,
        "adapted_blocks": [5],
        "tokenizer_options": {"stem_dim": 8, "num_heads": 2},
    }
    return MaskedReconstruction(family, **{**arguments, **options})  # type: ignore[arg-type]


def written(path: Path, state: dict[str, Tensor], **rest: Any) -> Path:
    """As their authors wrote them."""
    options = argparse.Namespace(model="mae_vit_large_patch16", norm_pix_loss=True, lr=1e-4)
    torch.save({"model": dict(state), "epoch": 799, "args": options, **rest}, path)
    return path


def layer_of(model: Any, name: str) -> Tensor:
    backbone = getattr(model, "vit_backbone", model)
    own = backbone.state_dict()
    found: Tensor = own[name if name in own else ".linear.".join(name.rsplit(".", 1))]
    return found


PUBLIC = {
    "SatMAE++": ("satmae++", satmaepp),
    "SatMAE++ (groups of bands)": ("satmae++", satmaepp_groups),
    "ScaleMAE": ("scalemae", scalemae),
    "MAE": ("satmae++", mae),
}


@pytest.mark.parametrize("source", PUBLIC)
def test_masked_autoencoders_in_stage2(tmp_path, source):
    family, make = PUBLIC[source]
    state = make()
    path = written(tmp_path / "public.pth", state)
    model = stage2(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = initialise_backbone(model, path)
    assert report.source == source
    assert report.sha256 == sha256_of(path)
    blocks = [name for name in state if name.startswith("blocks.")]
    assert len(blocks) == 12 * DEPTH
    assert report.loaded == ["cls_token", *blocks]
    for name in report.loaded:
        assert torch.equal(layer_of(model, name), state[name]), name
    rest = {name for name in state if not name.startswith("patch_embed.")}
    assert {*report.loaded, *report.left_out} == rest | {
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert set(report.missing.values()) == {"adapter", "HyperT", "fixed table, computed here"}
    # Positions are those of the model's family, in metres for ScaleMAE, whatever the file has.
    for name in ("vit_backbone.pos_embed", "head.conv_seg.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert vars(model)["base_weights"] == {
        "file": "public.pth",
        "source": source,
        "sha256": report.sha256,
    }


def test_satmaepp_in_stage1(tmp_path):
    state = satmaepp()
    model = stage1("satmae++", wavelengths=RGB)
    report = initialise_backbone(model, written(tmp_path / "a.pth", state))
    assert not report.adapted
    assert set(report.left_out) == {
        "pos_embed",
        "decoder_pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    for name in ("decoder_pred.weight", "up_block.proj_out.bias", "decoder_blocks.7.norm2.weight"):
        assert torch.equal(layer_of(model, name), state[name])
    assert {*report.loaded, *report.left_out} == set(state)


def test_scalemae_in_stage1_of_other_bands(tmp_path):
    state = scalemae()
    model = stage1("scalemae")
    report = initialise_backbone(model, written(tmp_path / "a.pth", state))
    assert set(report.adapted) == {
        f"fcn_{head}.pred.7.{kind}" for head in ("high", "low") for kind in ("weight", "bias")
    }
    # Bands at the file's own wavelengths are predicted as before, in the model's order; the
    # infrared one as red.
    name = "fcn_low.pred.7.weight"
    made, public = layer_of(model, name), state[name]
    torch.testing.assert_close(made, public[:, [2, 1, 0, 0]])
    start = stage1("scalemae")
    before = layer_of(start, name).clone()
    report = initialise_backbone(start, state, bands="official")
    assert torch.equal(layer_of(start, name), before)
    assert report.missing[name] == "4 bands are no multiple of the file's 3"
    six = stage1("scalemae", wavelengths=[0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    initialise_backbone(six, state, bands="official")
    assert torch.equal(layer_of(six, name), public.repeat(1, 2, 1, 1))


def test_satmaepp_in_stage1_of_other_bands():
    state = satmaepp()
    model = stage1("satmae++", wavelengths=[0.47, 0.64])
    report = initialise_backbone(model, state)
    made = layer_of(model, "decoder_pred.weight").unflatten(0, (256, 2))
    public = state["decoder_pred.weight"].unflatten(0, (256, 3))
    torch.testing.assert_close(made, public[:, [2, 0]])
    assert report.missing["proj_up_conv.weight"] == "as wide as there are bands"


@pytest.mark.parametrize("names", ["own", "transformers", "timm"])
def test_dinov3(tmp_path, names):
    state = dinov3()
    for index in range(DEPTH):
        state[f"blocks.{index}.attn.qkv.bias"][WIDTH : 2 * WIDTH] = 0
        if names == "timm":
            state[f"blocks.{index}.attn.qkv.bias"].zero_()
    path = tmp_path / "dinov3.pth"
    renamed = {"transformers": transformers_dinov3, "timm": timm_dinov3}
    torch.save(renamed[names](state) if names in renamed else dict(state), path)
    model = stage2("dinov3", adapter="lora", tokenizer="conv", wavelengths=RGB)
    report = initialise_backbone(model, path)
    suffix = {"own": "", "transformers": " (transformers)", "timm": " (timm)"}[names]
    assert report.source == f"DINOv3{suffix}"
    for name, tensor in state.items():
        if name not in ("mask_token", "local_cls_norm.weight", "local_cls_norm.bias"):
            own = "patch_embed.proj.proj." if name.startswith("patch_embed.") else None
            own = name if own is None else own + name.rpartition(".")[2]
            assert torch.equal(layer_of(model, own), tensor.to(layer_of(model, own).dtype)), name
    constants = {"constant", "adapter"}
    assert set(report.missing.values()) <= constants
    assert set(report.left_out) <= {"mask_token", "local_cls_norm.weight", "local_cls_norm.bias"}


def test_dinov3_with_aomoa_on_its_joint_projection():
    state = dinov3()
    model = stage2("dinov3", adapter=None, tokenizer="conv", wavelengths=RGB).eval()
    initialise_backbone(model, state)
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(images)
        adapt(model.vit_backbone, method="aomoa", targets="qkv$", blocks=[5])
        initialise_backbone(model, state)
        layer: Any = model.get_submodule("vit_backbone.blocks.5.attn.qkv")
        assert torch.equal(layer.linear.bias, state["blocks.5.attn.qkv.bias"])
        assert layer.linear.bias[WIDTH : 2 * WIDTH].any()  # which the mask hides
        layer.scaler.zero_()  # the adapter adds nothing
        torch.testing.assert_close(model(images), expected)


def test_dinov3_bias_mask_is_held_to_what_it_means():
    state = dinov3()
    state["blocks.3.attn.qkv.bias_mask"].fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"blocks\.3\.attn\.qkv\.bias_mask: got other values"):
        initialise_backbone(stage2("dinov3"), state)


def test_a_timm_vit_with_learned_positions_and_layer_scale():
    state = vit()
    for index in range(DEPTH):
        for scale in ("ls1", "ls2"):
            state.add(f"blocks.{index}.{scale}.gamma", WIDTH)
    state.layer("head", 1000, WIDTH)
    model = stage2("satmae++", image_size=96)
    report = initialise_backbone(model, state)
    made = layer_of(model, "pos_embed")
    assert made.shape == (1, 37, WIDTH)
    assert torch.equal(made[:, 0], state["pos_embed"][:, 0])
    assert report.adapted["pos_embed"] == "positions resampled from 14x14 to 6x6"
    torch.testing.assert_close(
        made[0, 1:].mean(), state["pos_embed"][0, 1:].mean(), atol=0.05, rtol=0
    )
    block = "blocks.7"
    scaled = state[f"{block}.mlp.fc2.weight"] * state[f"{block}.ls2.gamma"][:, None]
    assert torch.equal(layer_of(model, f"{block}.mlp.fc2.weight"), scaled)
    assert report.left_out[f"{block}.ls2.gamma"] == f"multiplied into {block}.mlp.fc2"
    assert report.left_out["head.weight"] == "classifier"
    same = stage2("satmae++")
    assert "pos_embed" in initialise_backbone(same, state).loaded
    assert torch.equal(layer_of(same, "pos_embed"), state["pos_embed"])
    with pytest.raises(CheckpointError, match="tensors not expected: pos_embed"):
        initialise_backbone(stage1("satmae++"), state)


def conv_model(wavelengths: list[float], **options: Any) -> Segmentation:
    return stage2("satmae++", adapter="lora", tokenizer="conv", wavelengths=wavelengths, **options)


def tokens(model: Segmentation, images: Tensor) -> Tensor:
    convolution = model.get_submodule("vit_backbone.patch_embed.proj.proj")
    out: Tensor = convolution(images)
    return out


def test_patch_embedding_by_wavelength():
    state = satmaepp()
    conv = torch.nn.functional.conv2d
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    rgb = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    expected = conv(rgb, weight, bias, stride=16)
    # The same bands in another order, and bands that nothing of the file is near.
    model = conv_model([0.47, 0.55, 0.64, 1.6, 2.2])
    report = initialise_backbone(model, state)
    images = torch.cat([rgb.flip(1), torch.rand(1, 2, 224, 224)], dim=1)
    torch.testing.assert_close(tokens(model, images), expected, atol=1e-4, rtol=1e-4)
    assert report.adapted["patch_embed.proj.weight"] == (
        "3 bands fitted by wavelength, 2 far from all of them at zero"
    )
    # Whatever the bands, a flat spectrum gives the same tokens.
    model = conv_model([0.45 + 0.02 * band for band in range(20)])
    initialise_backbone(model, state)
    grey = rgb[:, :1]
    flat = conv(grey.expand(-1, 3, -1, -1), weight, bias, stride=16)
    torch.testing.assert_close(
        tokens(model, grey.expand(-1, 20, -1, -1)), flat, atol=1e-4, rtol=1e-4
    )


def test_patch_embedding_the_papers_way_and_at_its_start():
    state = satmaepp()
    weight = state["patch_embed.proj.weight"]
    model = conv_model([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    initialise_backbone(model, state, bands="official")
    own = model.vit_backbone.patch_embed.proj.proj  # type: ignore[union-attr]
    assert torch.equal(own.weight, weight.repeat(1, 2, 1, 1))  # type: ignore[union-attr,arg-type]
    model = conv_model(FOUR)
    own = model.vit_backbone.patch_embed.proj.proj  # type: ignore[union-attr]
    before = own.weight.clone()  # type: ignore[union-attr,operator]
    report = initialise_backbone(model, state, bands="start")
    assert torch.equal(own.weight, before)  # type: ignore[union-attr,arg-type]
    assert report.missing["patch_embed.proj.weight"] == "3 bands in the file, 4 here"
    with pytest.raises(ValueError, match="bands: got 'rgb', expected one of wavelength"):
        initialise_backbone(model, state, bands="rgb")  # type: ignore[arg-type]


def test_patch_embedding_of_groups_of_bands():
    state = satmaepp_groups()
    bands = [0.490, 0.560, 0.665, 0.842, 0.705, 0.740, 0.783, 0.865, 1.610, 2.190]
    model = conv_model(bands, patch_size=8, image_size=96)
    report = initialise_backbone(model, state)
    images = torch.rand(1, 10, 96, 96, generator=torch.Generator().manual_seed(1))
    expected, first = torch.zeros(()), 0
    for group, count in enumerate((4, 4, 2)):
        weight, bias = (state[f"patch_embed.{group}.proj.{kind}"] for kind in ("weight", "bias"))
        part = images[:, first : first + count]
        expected = expected + torch.nn.functional.conv2d(part, weight, bias, stride=8) / 3
        first += count
    torch.testing.assert_close(tokens(model, images), expected, atol=1e-4, rtol=1e-4)
    assert report.adapted["patch_embed.proj.weight"] == "mean of the tokens of 3 groups of bands"


@pytest.mark.parametrize("patch", [8, 32])
def test_patches_of_another_size(patch):
    state = vit(patch=16)
    model = conv_model(RGB, patch_size=patch, image_size=14 * patch)
    report = initialise_backbone(model, state)
    assert report.adapted["patch_embed.proj.weight"] == "patches resampled from 16x16"
    # A smooth image at both resolutions gives the same tokens.
    line = torch.linspace(0, 1, 14 * 16)
    small = (line[:, None] + line[None]).expand(1, 3, -1, -1)
    expected = torch.nn.functional.conv2d(
        small, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16
    )
    blocks = small.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    resized = torch.nn.functional.interpolate(
        blocks, size=(patch, patch), mode="bilinear", antialias=patch < 16
    ).unflatten(0, (14, 14))
    large = resized.permute(2, 0, 3, 1, 4).reshape(1, 3, 14 * patch, 14 * patch)
    found = tokens(model, large)
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-4 if patch > 16 else 0.2)


def test_half_precision_files(tmp_path):
    state = {name: tensor.half() for name, tensor in satmaepp().items()}
    model = stage2("satmae++")
    report = initialise_backbone(model, written(tmp_path / "half.pth", state))
    name = "blocks.23.mlp.fc1.weight"
    assert layer_of(model, name).dtype == torch.float32
    assert torch.equal(layer_of(model, name), state[name].float())
    assert "fixed table" in report.left_out["pos_embed"]


def test_prefixes():
    for prefix in ("module.", "backbone.", "module.encoder.", "_orig_mod."):
        model = stage2("satmae++")
        state = {prefix + name: tensor for name, tensor in vit().items()}
        assert len(initialise_backbone(model, state).loaded) == 12 * DEPTH + 2


def test_what_is_not_expected_is_an_error_unless_asked_for():
    model = stage2("satmae++")
    start = layer_of(model, "blocks.0.norm1.weight").clone()
    state = mae()
    state.add("blocks.0.attn.q_norm.weight", 8)
    with pytest.raises(CheckpointError, match=r"1 tensors not expected: blocks\.0\.attn\.q_norm"):
        initialise_backbone(model, state)
    short = mae()
    del short["blocks.9.norm1.bias"]
    with pytest.raises(CheckpointError, match=r"1 tensors missing: blocks\.9\.norm1\.bias"):
        initialise_backbone(model, short)
    other = mae()
    other.add("blocks.9.norm1.bias", WIDTH + 1)
    with pytest.raises(CheckpointError, match=r"blocks\.9\.norm1\.bias: got shape \[17\]"):
        initialise_backbone(model, other)
    deeper = mae()
    deeper.blocks("blocks", DEPTH + 1, WIDTH)
    with pytest.raises(CheckpointError, match=r"12 tensors not expected: blocks\.24\.norm1"):
        initialise_backbone(model, deeper)
    with pytest.raises(CheckpointError, match="tensors not expected: storage_tokens"):
        initialise_backbone(model, dinov3())
    with pytest.raises(CheckpointError, match="not expected: pos_embed"):
        initialise_backbone(stage2("dinov3"), vit())
    assert torch.equal(layer_of(model, "blocks.0.norm1.weight"), start)
    report = initialise_backbone(model, state, strict=False)
    assert report.left_out["blocks.0.attn.q_norm.weight"] == "not known here"
    report = initialise_backbone(model, short, strict=False)
    assert report.missing["blocks.9.norm1.bias"] == "not in the file"
    assert "  blocks.9.norm1.bias: not in the file" in report.table().splitlines()


def test_hashes(tmp_path):
    path = written(tmp_path / "public.pth", mae())
    digest = sha256_of(path)
    named = path.rename(tmp_path / f"vit-{'0' if digest[0] != '0' else '1'}{digest[1:8]}.pth")
    letters = any(letter in "abcdef" for letter in named.stem)
    model = stage2("satmae++")
    if letters:
        with pytest.raises(CheckpointError, match=r"got sha256 .*, expected "):
            initialise_backbone(model, named)
    right = named.rename(tmp_path / f"vit-{digest[:8]}.pth")
    assert initialise_backbone(model, right, sha256=digest).sha256 == digest
    with pytest.raises(CheckpointError, match="expected 00000000"):
        initialise_backbone(model, right, sha256="00000000")
    dated = right.rename(tmp_path / "vit-20240101.pth")
    initialise_backbone(model, dated)
