"""Files of tensors are read, written and described without running code."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from spectralx.checkpoints import (
    CheckpointError,
    export_official,
    initialise_from_stage1,
    inspect,
    load,
    load_official,
    read_adapters,
    save,
)
from spectralx.checkpoints.__main__ import main
from spectralx.checkpoints.official import official_state_dict
from spectralx.checkpoints.reading import read_file
from spectralx_kernels import official_inert, official_parameters
from tests.spectralx.small_models import images, stage1, stage2

OLD, NEW = False, True


def saved(path: Path, value: Any, zipped: bool = NEW) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, generator=generator)
    return {
        "weight": wide,
        "half": wide.half(),
        "brain": nn.Parameter(wide.bfloat16()),
        "view": wide[1:, ::2],
        "count": torch.tensor(3),
        "none": torch.zeros(0, 2),
    }


@pytest.mark.parametrize("zipped", [NEW, OLD])
def test_what_public_checkpoints_hold_is_read(tmp_path, zipped):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    options = argparse.Namespace(model="mae_vit_large_patch16", betas=(0.9, 0.95), dist=None)
    path = saved(
        tmp_path / "public.pth",
        {
            "model": {**model.state_dict(), **state()},
            "optimizer": optimizer.state_dict(),
            "args": options,
            "epoch": 799,
            "scaler": {"scale": 65536.0},
        },
        zipped,
    )
    file = read_file(path)
    assert file.container == ("torch zip" if zipped else "torch legacy")
    assert file.rest["args"] == options
    assert set(file.rest) == {"optimizer", "args", "epoch", "scaler"}
    for name, tensor in {**model.state_dict(), **state()}.items():
        assert torch.equal(file.tensors[name], tensor), name
    text = "\n".join(inspect(path))
    assert "classes: argparse.Namespace" in text
    assert 'args: 3 entries: model="mae_vit_large_patch16", betas=[0.9, 0.95], dist=null' in text
    assert "view    float32 [3, 3]" in text


class Calls:
    """A pickle of it calls `function` where it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("zipped", [NEW, OLD])
@pytest.mark.parametrize("place", ["state", "beside", "options"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, zipped, place):
    marker = tmp_path / "ran"
    evil = Calls(os.mkdir, str(marker))
    value: dict[str, Any] = {"model": state(), "args": argparse.Namespace()}
    if place == "state":
        value["model"]["weight"] = evil
    elif place == "beside":
        value["evil"] = evil
    else:
        value["args"].evil = evil
    path = saved(tmp_path / "evil.pth", value, zipped)
    with pytest.raises(
        CheckpointError, match=r"not a file of tensors alone: it names posix\.mkdir"
    ):
        read_file(path)
    assert inspect(path)[-1] == "not usable: not a file of tensors alone: it names posix.mkdir"
    assert not marker.exists()
    bare = tmp_path / "bare.pkl"
    bare.write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError, match="not a file of tensors alone"):
        read_file(bare)
    assert not marker.exists()


class Other(argparse.Namespace):
    pass


def test_exactly_one_class_is_allowed(tmp_path):
    for value, name in (
        (Path("x"), "pathlib"),
        (Other(), "Other"),
        (torch.nn.Linear, "Linear"),
        ({1}, "set"),
    ):
        path = saved(tmp_path / "file.pth", {"model": state(), "args": value})
        with pytest.raises(CheckpointError, match=rf"it names .*{name}"):
            read_file(path)


def test_only_dense_tensors(tmp_path):
    dense = torch.eye(3)
    for tensor, what in (
        (dense.to_sparse(), "a sparse tensor"),
        (dense.to_sparse_csr(), "a sparse tensor"),
        (torch.empty(3, device="meta"), "a tensor without values"),
        (torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8), "it names torch|a quantised"),
    ):
        path = saved(tmp_path / "file.pth", {"weight": tensor})
        with pytest.raises(CheckpointError, match=f"not a file of tensors alone: .*({what})"):
            read_file(path)
    with pytest.raises(CheckpointError, match="weight: not dense, expected dense tensors"):
        read_file({"weight": dense.to_sparse()})


class Pid:
    """Stands for a storage in a pickle made by hand."""

    def __init__(self, key: str, numel: int) -> None:
        self.pid = ("storage", torch.FloatStorage, key, "cpu", numel)


class ByHand(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Pid) else None


def forged(
    path: Path,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    offset: int = 0,
    numel: int = 4,
    held: int = 4,
    compressed: bool = False,
) -> Path:
    """A zip of one tensor whose sizes may be lies."""
    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Calls(rebuild, Pid("0", numel), offset, shape, stride, False, {})
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        with archive.open("archive/data.pkl", "w") as stream:
            ByHand(stream, protocol=2).dump({"weight": tensor})
        archive.writestr("archive/data/0", struct.pack(f"{held}f", *range(held)))
        archive.writestr("archive/version", "3\n")
    return path


def test_sizes_are_checked_before_anything_is_allocated(tmp_path):
    path = tmp_path / "forged.pth"
    sound = read_file(forged(path, (2, 2), (2, 1)))
    assert sound.tensors["weight"].tolist() == [[0, 1], [2, 3]]
    huge = 1 << 40
    for options, message in (
        ({"shape": (huge,), "stride": (1,)}, "of a storage of 4"),
        ({"shape": (huge, huge), "stride": (0, 0)}, "of a storage of 4"),
        ({"shape": (2, 2), "stride": (2, 1), "offset": 1}, "from element 1 of a storage of 4"),
        ({"shape": (-2, 2), "stride": (2, 1)}, r"a tensor of shape \(-2, 2\)"),
        ({"shape": (2,), "stride": (-1,)}, r"strides \(-1,\)"),
        ({"shape": (huge,), "stride": (1,), "numel": huge}, "storage 0: 16 bytes, expected 4398"),
        ({"shape": (2,), "stride": (1,), "numel": -1}, "a storage of -1 elements"),
        ({"shape": (4,), "stride": (1,), "held": 3}, "storage 0: 12 bytes, expected 16"),
        ({"shape": (4,), "stride": (1,), "compressed": True}, "compressed records"),
    ):
        forged(path, **options)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=message):
            read_file(path)
        assert "not usable: " in inspect(path)[-1]


def test_a_memo_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "memo.pth"
    with zipfile.ZipFile(path, "w") as archive:
        # An empty dictionary, put at index 2^31: an unpickler would make room up to there.
        archive.writestr("archive/data.pkl", b"\x80\x02}r" + struct.pack("<I", 1 << 31) + b".")
    with pytest.raises(CheckpointError, match="memo index 2147483648 in a pickle of at most"):
        read_file(path)


def test_a_legacy_file_that_is_cut_is_refused(tmp_path):
    path = saved(tmp_path / "cut.pth", state(), OLD)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="bytes of storages, expected"):
        read_file(path)


# The published layout, out and in again.


@pytest.mark.parametrize("family", ["scalemae", "satmae++", "dinov3"])
def test_stage2_goes_out_and_comes_back_with_the_same_logits(tmp_path, family):
    torch.manual_seed(0)
    model = stage2(family=family)
    path = export_official(model, tmp_path / "out" / "stage2.ckpt")
    state = read_file(path).tensors
    names = {*official_parameters(model), *official_inert(model)}
    assert set(state) == {f"model.{name}" for name in names}
    shapes = official_inert(model)
    for name, shape in shapes.items():
        assert tuple(state[f"model.{name}"].shape) == shape
    keys = state["model.AreApt.spa_match_attn.to_kv.weight"]
    own = model.state_dict()["AreApt.spa_match_attn.to_k.weight"]
    assert torch.equal(keys[: len(keys) // 2], own)
    assert not keys[len(keys) // 2 :].any()
    again = stage2(family=family)
    load_official(again, path)
    assert torch.equal(again(images()), model(images()))
    assert list(path.parent.iterdir()) == [path]
    assert any("stage 2 in the published names" in line for line in inspect(path))


@pytest.mark.parametrize("family", ["scalemae", "satmae++"])
def test_stage1_goes_out_and_comes_back_with_the_same_loss(tmp_path, family):
    torch.manual_seed(0)
    model = stage1(family=family, fcn_dim=8)
    path = export_official(model, tmp_path / "stage1.ckpt")
    state = official_state_dict(model)
    torch.testing.assert_close(state["pos_embed"][0], model.positions)
    again = stage1(family=family, fcn_dim=8)
    load_official(again, path)
    noise = model.draw_mask_noise(images())
    assert torch.equal(again(images(), noise).loss, model(images(), noise).loss)
    assert any("stage 1 in the published names" in line for line in inspect(path))


def test_lightning_files_are_told_apart(tmp_path):
    model = stage2()
    names = {f"model.{name}": tensor for name, tensor in official_state_dict(model).items()}
    lightning = {"pytorch-lightning_version": "2.6.6", "epoch": 3, "loops": {}, "callbacks": {}}
    path = saved(tmp_path / "last.ckpt", {"state_dict": names, "optimizer_states": [], **lightning})
    text = "\n".join(inspect(path))
    assert (
        "kind: stage 2 in the published names in a file of Lightning's to resume training from"
        in text
    )
    again = stage2()
    load_official(again, path)
    assert torch.equal(again(images()), model(images()))
    for read, expected in (
        (load, "got a file, expected a checkpoint folder"),
        (read_adapters, "not a safetensors file, expected adapters"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            read(path)
    with pytest.raises(CheckpointError, match="got a file, expected a checkpoint folder"):
        initialise_from_stage1(again, path)
    # What is published holds nothing of it, and is no file to resume from.
    folder = save(tmp_path / "published", model)
    assert not any("resume" in line for line in inspect(folder))
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}


# What is it?


def test_inspect_says_what_anything_is(tmp_path, capsys):
    folder = save(tmp_path / "ours", stage2(), wavelengths=[0.5], class_names=["none", "water"])
    files = {
        "ours": "spectralx-checkpoint 1, a segmentation model, whole",
        "text.txt": "not usable: not a file of tensors alone: no pickle of torch.save",
        "empty.pth": "not usable: not a file of tensors alone",
        "list.pth": "kind: a list, no state dict",
        "plain.safetensors": "kind: tensors of an unknown model",
        "broken.safetensors": "not usable: not a safetensors file",
        "": "a folder without manifest.json, no checkpoint",
    }
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"words")
    saved(tmp_path / "list.pth", [1, 2])
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "plain.safetensors")
    for name, expected in files.items():
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert expected in capsys.readouterr().out, name
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / manifest["tensors"]["file"]).unlink()
    assert "a damaged checkpoint" in inspect(folder)[0]
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
