"""Files of what training changed, alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralx.checkpoints import (
    CheckpointError,
    initialise_backbone,
    inspect,
    load_adapters,
    read_adapters,
    save,
    save_adapters,
)
from spectralx.checkpoints.__main__ import main
from spectralx.checkpoints.adapters import parts_of
from tests.spectralx.small_models import images, stage2


def test_adapters_go_onto_the_same_base_only(tmp_path):
    torch.manual_seed(0)
    trained = stage2(adapter="lora")
    base = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    trained.train()(images().expand(2, -1, -1, -1))  # moves the batch norms' statistics
    trained.eval()
    path = save_adapters(tmp_path / "adapters.safetensors", trained, extra={"step": 3})
    file = read_adapters(path)
    assert file.manifest["extra"] == {"step": 3}
    frozen = {name for name, parameter in trained.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert not frozen & set(file.tensors)
    again = stage2(adapter="lora")
    again.load_state_dict(base)
    assert load_adapters(again, path) == []
    assert torch.equal(again(images()), trained(images()))
    other = stage2(adapter="lora")
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="these adapters belong on another base"):
        load_adapters(other, path)
    with pytest.raises(CheckpointError, match=r"tensors not expected|of another shape"):
        load_adapters(stage2(adapter="ia3"), path)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert any("kind: spectralx-adapters of a Segmentation" in line for line in inspect(path))


def test_adapters_of_any_model_and_without_a_part(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4), nn.Linear(4, 2))
    path = save_adapters(tmp_path / "a.safetensors", model, leave_out=r"^2\.")
    assert set(read_adapters(path).tensors) == {"1.weight", "1.bias"}
    again = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    again[0].load_state_dict(model[0].state_dict())
    assert load_adapters(again, path) == ["2.weight", "2.bias"]
    assert torch.equal(again.state_dict()["1.weight"], model.state_dict()["1.weight"])
    with pytest.raises(CheckpointError, match="of which nothing trains"):
        save_adapters(tmp_path / "b.safetensors", model[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_half_the_bytes(tmp_path, dtype):
    torch.manual_seed(0)
    model = stage2()
    whole = save_adapters(tmp_path / "whole.safetensors", model, leave_out=r"^(neck|head)\.")
    half = save_adapters(
        tmp_path / "half.safetensors", model, leave_out=r"^(neck|head)\.", dtype=dtype
    )
    full, stored = read_adapters(whole).tensors, read_adapters(half).tensors
    assert full.keys() == stored.keys()
    for name, tensor in full.items():
        if tensor.ndim < 2:
            assert torch.equal(stored[name], tensor), name
        else:
            assert stored[name].dtype == dtype
            assert torch.equal(stored[name], tensor.to(dtype)), name
    again = stage2()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in again.get_submodule("vit_backbone.blocks.3.mlp").parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_adapters(again, half)
    name = "vit_backbone.blocks.3.mlp.fc1.down.weight"
    expected = model.get_parameter(name).to(dtype).float()
    assert torch.equal(again.get_parameter(name), expected)
    found, expected = again(images()), model(images())
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert not torch.equal(found, expected)


def test_adapters_that_half_precision_cannot_hold(tmp_path):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 1e6)
    with pytest.raises(CheckpointError, match=r"weight: got values up to 1e\+06, expected"):
        save_adapters(tmp_path / "a.safetensors", model, dtype=torch.float16)
    assert not any(tmp_path.iterdir())
    path = save_adapters(tmp_path / "a.safetensors", model, dtype=torch.bfloat16)
    assert read_adapters(path).tensors["weight"].dtype == torch.bfloat16


def test_adapters_bring_the_frozen_tokenizer_where_asked(tmp_path):
    """HyperT is frozen at its random start, which no public file has."""
    torch.manual_seed(0)
    plain, trained, other = stage2(adapter=None), stage2(), stage2()
    public = {
        name.removeprefix("vit_backbone."): tensor
        for name, tensor in plain.state_dict().items()
        if name.startswith("vit_backbone.")
    }
    for model in (trained, other):
        initialise_backbone(model, public)
    path = tmp_path / "a.safetensors"
    save_adapters(path, trained)
    with pytest.raises(CheckpointError, match="these adapters belong on another base"):
        load_adapters(other, path)
    save_adapters(path, trained, include=r"^vit_backbone\.patch_embed\.")
    load_adapters(other, path)
    assert torch.equal(other(images()), trained(images()))


def test_the_command_that_writes_adapters(tmp_path, capsys):
    torch.manual_seed(0)
    model = stage2()
    initialise_backbone(model, {**stage2(adapter=None).vit_backbone.state_dict()})
    folder, file = save(tmp_path / "ours", model), tmp_path / "adapters.safetensors"
    command = ["adapters", str(folder), str(file), "--leave-out", r"^(neck|head)\."]
    assert main([*command, "--dtype", "float16"]) == 0
    printed = capsys.readouterr().out
    assert "MB  vit_backbone.blocks.mlp.fc1" in printed
    assert "neck" not in printed
    found = read_adapters(file)
    base: Any = model.base_weights
    assert found.manifest["base"]["source"] == base["source"]
    assert sum(parts_of(found.tensors).values()) == sum(t.nbytes for t in found.tensors.values())
    load_adapters(model, file)
    assert main(["adapters", str(tmp_path / "nowhere"), str(file)]) == 2
    assert "nowhere: got no manifest.json" in capsys.readouterr().err


def test_damaged_and_foreign_adapters(tmp_path):
    path = save_adapters(tmp_path / "a.safetensors", nn.Linear(2, 2))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"got tensors of sha256 .*: the file is damaged"):
        read_adapters(path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="format: got None, expected 'spectralx-adapters'"):
        read_adapters(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="no such file, expected adapters"):
        read_adapters(tmp_path / "c.safetensors")


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    path = save_adapters(tmp_path / "a.safetensors", model)
    before = path.read_bytes()

    def fail(*unused: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("spectralx.checkpoints.adapters.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_adapters(path, nn.Linear(2, 2))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
