"""What a model starts from: stage 1, or public weights of a backbone."""

from __future__ import annotations

import pytest
import torch

from spectralx.checkpoints import (
    CheckpointError,
    initialise_backbone,
    initialise_from_stage1,
    save,
)
from spectralx.segmentation import Segmentation
from tests.spectralx.small_models import manifest_of, stage1, stage2


@pytest.fixture(scope="module")
def model() -> Segmentation:
    torch.manual_seed(0)
    return stage2()


def test_stage2_starts_from_stage1(tmp_path):
    first, second = stage1(), stage2()
    report = initialise_from_stage1(second, save(tmp_path, first))
    ours, theirs = second.state_dict(), first.state_dict()
    for name in report.loaded:
        assert torch.equal(ours[name], theirs[name.removeprefix("vit_backbone.")]), name
    assert "vit_backbone.blocks.3.mlp.fc1.gate" in report.loaded
    assert "vit_backbone.patch_embed.proj.proj.spa_query" in report.loaded
    assert "vit_backbone.blocks.0.norm1.weight" in report.loaded
    assert "vit_backbone.cls_token" in report.loaded
    backbone = {name for name in ours if name.startswith("vit_backbone.")}
    assert {*report.loaded, *report.missing} == backbone
    assert set(report.missing) == {"vit_backbone.pos_embed"}
    assert set(report.left_out) >= {"mask_token", "decoder_embed.weight"}
    assert str(report).startswith(f"{len(report.loaded)} tensors from {tmp_path} (stage 1); ")
    assert str(report).endswith("; 1 kept: vit_backbone.pos_embed (not there)")
    # The fixed positions are those stage 1 computed.
    torch.testing.assert_close(ours["vit_backbone.pos_embed"][0], first.positions)


def test_other_bands_keep_the_tokenizer():
    second = stage2(wavelengths=[0.5, 0.6, 0.7])
    report = initialise_from_stage1(second, stage1())
    name = "vit_backbone.patch_embed.proj.down.weight"
    assert report.missing[name] == "got shape [16, 4, 4, 4], expected [16, 3, 4, 4]"
    assert "vit_backbone.blocks.0.attn.qkv.weight" in report.loaded


def test_stage1_of_other_sizes_changes_nothing(tmp_path, model):
    second = stage2(embed_dim=32)
    name = "vit_backbone.blocks.0.norm1.weight"
    before = second.state_dict()[name].clone()
    with pytest.raises(CheckpointError, match=r"stage1: cls_token: got shape \[1, 1, 16\]"):
        initialise_from_stage1(second, stage1())
    assert torch.equal(second.state_dict()[name], before)
    with pytest.raises(CheckpointError, match="got a checkpoint of a segmentation model"):
        initialise_from_stage1(second, save(tmp_path, model))


def test_stage1_adapted_elsewhere(tmp_path):
    """The layers inside and outside adapters are the same layers."""
    first = stage1(adapted_blocks=[1])
    for adapter, blocks in (("aomoa", [2]), (None, None)):
        second = stage2(adapter=adapter, adapted_blocks=blocks, tokenizer="hypert")
        report = initialise_from_stage1(second, first)
        assert not any("blocks.1.mlp.fc1" in name and "linear" in name for name in report.missing)
        ours = second.state_dict()
        name = "vit_backbone.blocks.1.mlp.fc1.weight"
        weight = ours[name if name in ours else name.replace("weight", "linear.weight")]
        assert torch.equal(weight, first.state_dict()["blocks.1.mlp.fc1.linear.weight"])


@pytest.mark.parametrize("family", ["satmae++", "dinov3"])
def test_public_weights_of_a_backbone(tmp_path, family):
    plain = stage2(family=family, adapter=None)
    public = {
        name.removeprefix("vit_backbone."): tensor
        for name, tensor in plain.state_dict().items()
        if name.startswith("vit_backbone.")
    }
    torch.save({"model": {**public, "head.weight": torch.zeros(2)}}, tmp_path / "public.pth")
    for adapter in ("aomoa", "lora"):
        model = stage2(family=family, adapter=adapter, adapted_blocks=[1])
        report = initialise_backbone(model, tmp_path / "public.pth")
        backbone = model.state_dict()
        for layer in ("mlp.fc1", "mlp.fc2"):
            loaded = backbone[f"vit_backbone.blocks.1.{layer}.linear.weight"]
            assert torch.equal(loaded, public[f"blocks.1.{layer}.weight"])
        assert ("patch_embed.proj.weight" in report.loaded) == (adapter == "lora")
        untouched = {
            name for name in report.missing if "blocks." in name and "blocks.1." not in name
        }
        assert not untouched
    with pytest.raises(CheckpointError, match="got no blocks of a transformer"):
        initialise_backbone(model, {"head.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"cls_token: got shape \[1, 1, 16\], expected"):
        initialise_backbone(stage2(family=family, embed_dim=32), tmp_path / "public.pth")


def test_public_weights_in_stage1():
    plain, model = stage1(adapter=None, tokenizer_options=None), stage1()
    initialise_backbone(model, plain.state_dict())
    for name in ("blocks.3.mlp.fc1", "decoder_blocks.0.mlp.fc2", "decoder_embed"):
        assert torch.equal(
            model.state_dict()[f"{name}.linear.weight"], plain.state_dict()[f"{name}.weight"]
        )


def test_manifests_say_what_the_model_started_from(tmp_path):
    plain, first, second = stage1(adapter=None, tokenizer_options=None), stage1(), stage2()
    torch.save(plain.state_dict(), tmp_path / "public.pth")
    report = initialise_backbone(first, tmp_path / "public.pth")
    folder = save(tmp_path / "first", first)
    base = {"file": "public.pth", "source": "SatMAE++", "sha256": report.sha256}
    assert manifest_of(folder)["base"] == base
    initialise_from_stage1(second, folder)
    assert manifest_of(save(tmp_path / "second", second))["base"] == base
    assert manifest_of(save(tmp_path / "none", stage2()))["base"] is None
