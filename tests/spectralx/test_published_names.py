"""State dicts in the published names: what loads, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spectralx.checkpoints import (
    CheckpointError,
    load_official,
)
from spectralx_kernels import official_inert, official_parameters
from tests.spectralx.small_models import stage2


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
