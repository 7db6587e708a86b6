from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectralx import checkpoints
from spectralx.checkpoints import (
    CheckpointError,
    initialise_backbone,
    initialise_from_stage1,
    load,
    load_official,
    save,
)
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation
from spectralx_kernels import official_inert, official_parameters

WAVELENGTHS = [0.45, 0.55, 0.65, 0.85]
BACKBONE: dict[str, Any] = {
    "family": "satmae++",
    "wavelengths": WAVELENGTHS,
    "image_size": 32,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
}


def stage2(**options: Any) -> Segmentation:
    bands = len(options.get("wavelengths", WAVELENGTHS))
    arguments = {
        **BACKBONE,
        "in_channels": bands,
        "num_classes": 3,
        "stem_dim": 8,
        "tokenizer_heads": 2,
        "neck_channels": 8,
        "head_channels": 8,
    }
    return Segmentation(**{**arguments, **options}).eval()


def stage1(**options: Any) -> MaskedReconstruction:
    arguments = {
        **BACKBONE,
        "in_channels": len(WAVELENGTHS),
        "tokenizer_options": {"stem_dim": 8, "num_heads": 2},
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    }
    return MaskedReconstruction(**{**arguments, **options}).eval()


def images() -> Tensor:
    return torch.rand(1, len(WAVELENGTHS), 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> Segmentation:
    torch.manual_seed(0)
    return stage2()


@pytest.fixture
def folder(tmp_path: Path, model: Segmentation) -> Path:
    return save(tmp_path / "runs" / "best", model)


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / checkpoints.MANIFEST).read_text())
    return found


def edit_manifest(folder: Path, **changes: Any) -> None:
    (folder / checkpoints.MANIFEST).write_text(json.dumps({**manifest_of(folder), **changes}))


def test_a_model_comes_back(tmp_path, model):
    save(
        tmp_path,
        model,
        wavelengths=WAVELENGTHS,
        class_names=["unlabelled", "water", "land"],
        normalisation={"scaling": "image"},
        extra={"step": 7},
    )
    found = load(tmp_path / checkpoints.MANIFEST)
    again = found.build()
    assert type(again) is Segmentation
    assert not again.training
    assert torch.equal(again(images()), model(images()))
    assert found.config == json.loads(json.dumps(model.config))
    assert found.manifest["wavelengths"] == WAVELENGTHS
    assert found.manifest["class_names"] == ["unlabelled", "water", "land"]
    assert found.manifest["normalisation"] == {"scaling": "image"}
    assert found.manifest["extra"] == {"step": 7}
    assert found.manifest["code_version"]


def test_a_stage1_model_comes_back(tmp_path):
    first = stage1()
    again = load(save(tmp_path, first)).build()
    assert type(again) is MaskedReconstruction
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_new_checkpoint_replaces_the_old_one(folder, model):
    before = manifest_of(folder)["tensors"]["file"]
    other = stage2()
    save(folder, other)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([checkpoints.MANIFEST, manifest_of(folder)["tensors"]["file"]])
    assert before not in names
    assert torch.equal(load(folder).build()(images()), other(images()))
    save(folder, other)
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize("step", ["save_file", "os.replace"])
def test_a_failed_save_leaves_the_old_checkpoint(folder, model, monkeypatch, step):
    before = sorted(path.name for path in folder.iterdir())

    def fail(*unused: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(f"spectralx.checkpoints.folder.{step}", fail)
    with pytest.raises(OSError, match="no space left"):
        save(folder, stage2())
    assert sorted(path.name for path in folder.iterdir()) == before
    assert torch.equal(load(folder).build()(images()), model(images()))


def test_files_are_readable_by_others(folder):
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_only_known_models_and_plain_configurations(tmp_path, model):
    with pytest.raises(CheckpointError, match="model: got Linear, expected one of Masked"):
        save(tmp_path / "a", nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(tmp_path / "a", model, {"family": object()})
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: got a file, expected a folder"):
        save(tmp_path / "file", model)


def test_missing(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"nowhere: got no manifest\.json"):
        load(tmp_path / "nowhere")
    name = manifest_of(folder)["tensors"]["file"]
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        load(folder)


def test_damaged_tensors(folder):
    file = folder / manifest_of(folder)["tensors"]["file"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"got sha256 .*, expected .*: the file is damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format: got 'other', expected 'spectralx-checkpoint'"),
        ({"format_version": 2}, "format_version: got 2, expected 1"),
        ({"model": 3}, "model: got 3, expected a name"),
        ({"config": []}, r"config: got \[\], expected an object"),
        ({"tensors": None}, "tensors: got None, expected a file"),
        ({"tensors": {"file": "../x", "sha256": ""}}, "got file '../x', expected a name in"),
    ],
)
def test_another_manifest(folder, changes, message):
    edit_manifest(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"manifest\.json: .*{message}"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_no_manifest_at_all(folder, text):
    (folder / checkpoints.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: (not JSON|format: got 'list')"):
        load(folder)


def test_another_configuration(folder, model):
    edit_manifest(folder, model="os.system")
    with pytest.raises(CheckpointError, match=r"model: got 'os\.system', expected one of rec"):
        load(folder).build()
    edit_manifest(folder, model="segmentation", config={**model.config, "depht": 3})
    with pytest.raises(CheckpointError, match=r"config: .*unexpected keyword argument 'depht'"):
        load(folder).build()
    edit_manifest(folder, config={**model.config, "patch_size": 5})
    with pytest.raises(CheckpointError, match="config: image_size: got 32"):
        load(folder).build()


def test_other_sizes_change_nothing(folder):
    other = stage2(num_classes=5)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"best: 2 tensors of another shape: head\.conv_seg\.weight "
        r"\(got \(3, 8, 1, 1\), expected \(5, 8, 1, 1\)\)",
    ):
        load(folder).load_into(other)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(CheckpointError, match=r"tensors missing: .*tensors not expected: "):
        load(folder).load_into(stage2(adapter="lora"))


def test_errors_are_one_line(folder):
    with pytest.raises(CheckpointError) as error:
        load(folder).load_into(stage2(depth=2, embed_dim=32))
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


# Published state dicts.


def published(model: nn.Module) -> dict[str, Tensor]:
    """A state dict in the published names, with what they hold without effect."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, where in official_parameters(model).items():
        tensor = where.of(model.state_dict()[where.name])
        if name.endswith("to_kv.weight") and "AreApt" in name:
            tensor = torch.cat([tensor, tensor])  # keys, and values without effect
        drawn = torch.randn(tensor.shape, generator=generator)
        state[name] = drawn if tensor.is_floating_point() else tensor.clone()
    for name, shape in official_inert(model).items():
        state[name] = torch.zeros(shape)
    return state


@pytest.mark.parametrize("family", ["scalemae", "dinov3"])
def test_published_names_load(family):
    model = stage2(family=family)
    state = published(model)
    load_official(model, state)
    own = model.state_dict()
    for name, where in official_parameters(model).items():
        loaded = where.of(own[where.name])
        expected = state[name][: len(loaded)] if loaded.dim() else state[name]
        assert torch.equal(loaded, expected.to(loaded.dtype)), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_files_load(tmp_path, suffix):
    model, path = stage2(), tmp_path / f"published{suffix}"
    state = published(model)
    if suffix == ".pth":
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": wrapped, "epoch": 3}, path)
    else:
        save_file(state, path)
    load_official(model, path)
    assert torch.equal(model.head.conv_seg.weight, state["head.conv_seg.weight"])


def test_published_names_are_checked_both_ways():
    model = stage2()
    state = published(model)
    before = model.head.conv_seg.weight.clone()
    name = "vit_backbone.blocks.0.norm1.weight"
    short = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(CheckpointError, match=f"state_dict: 1 tensors missing: {name}"):
        load_official(model, short)
    with pytest.raises(CheckpointError, match="1 tensors not expected: surplus"):
        load_official(model, {**state, "surplus": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="surplus: not tensors"):
        load_official(model, {**state, "surplus": 3})  # type: ignore[dict-item]
    assert torch.equal(model.head.conv_seg.weight, before)
    with pytest.raises(CheckpointError, match=r"size mismatch for head\.conv_seg\.bias"):
        load_official(model, {**state, "head.conv_seg.bias": torch.zeros(9)})
    with pytest.raises(CheckpointError, match=r"norm\.bias: got shape \[3\], expected \[16\]"):
        load_official(model, {**state, "norm.bias": torch.zeros(3)})


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_file_never_runs_code(tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"state_dict": _Payload(marker)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pth: not a file of tensors alone"):
        load_official(stage2(), path)
    torch.save({"state_dict": _Payload(marker)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth: not a file of tensors alone"):
        load_official(stage2(), path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", None, "a.pth: no such file"),
        ("a.pth", b"", "a.pth: not a file of tensors alone"),
        ("a.pth", b"text", "a.pth: not a file of tensors alone"),
        ("a.safetensors", b"text", "a.safetensors: not a safetensors file"),
    ],
)
def test_unreadable_published_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_official(stage2(), tmp_path / name)


# Stage 2 from stage 1.


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


def test_safetensors_hold_the_state_dict(folder, model):
    tensors = load_file(folder / manifest_of(folder)["tensors"]["file"])
    assert tensors.keys() == model.state_dict().keys()


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
