from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spectralx import checkpoints
from spectralx.checkpoints import (
    CheckpointError,
    load,
    save,
)
from spectralx.checkpoints.lean import load_lean, products
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation
from tests.spectralx.small_models import WAVELENGTHS, images, manifest_of, stage1, stage2


@pytest.fixture(scope="module")
def model() -> Segmentation:
    torch.manual_seed(0)
    return stage2()


@pytest.fixture
def folder(tmp_path: Path, model: Segmentation) -> Path:
    return save(tmp_path / "runs" / "best", model)


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


def test_safetensors_hold_the_state_dict(folder, model):
    tensors = load_file(folder / manifest_of(folder)["tensors"]["file"])
    assert tensors.keys() == model.state_dict().keys()


@pytest.mark.parametrize("adapter", ["aomoa", "lora", None])
def test_a_lean_model_is_the_model(tmp_path, adapter):
    torch.manual_seed(1)
    one = stage2(adapter=adapter)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = save(tmp_path, one)
    whole, (lean, manifest) = load(path).build().requires_grad_(False), load_lean(path)
    assert manifest == manifest_of(path)
    assert not lean.training
    assert not any(parameter.requires_grad for parameter in lean.parameters())
    with torch.inference_mode():
        assert torch.equal(lean(images()), whole(images()))
        # Weights kept in the type that autocast brings them to: half the bytes, the same results.
        half, _ = load_lean(path, torch.bfloat16)
        fresh = load(path).build().requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(half(images()), fresh(images()))
    names = products(half)
    assert any(name.startswith("vit_backbone.blocks.0.") for name in names)
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if name in names else whole.state_dict()[name].dtype)
        assert not tensor.is_meta


def test_a_lean_model_of_other_tensors_is_refused(folder):
    manifest = manifest_of(folder)
    edit_manifest(folder, config={**manifest["config"], "depth": 2, "embed_dim": 32})
    with pytest.raises(CheckpointError, match="60 tensors of another shape"):
        load_lean(folder)
    (folder / manifest["tensors"]["file"]).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="got sha256"):
        load_lean(folder)
    torch.nn.Linear(2, 2).weight.sum().item()  # layers have their memory again
