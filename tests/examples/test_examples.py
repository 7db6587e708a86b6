"""The gallery: every example runs as it is and does what it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str, *needs: str) -> ModuleType:
    for package in needs:
        pytest.importorskip(package, reason=f"{package} is not installed")
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_lists_every_example() -> None:
    text = (FOLDER / "README.md").read_text()
    names = [file.name for file in FOLDER.glob("*.py")]
    assert len(names) == 4
    assert all(f"`{name}`" in text for name in names)


def test_transformers_vit(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("transformers_vit", "transformers").main([])
    assert "aomoa on 4 layers" in capsys.readouterr().out
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_hypert_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("hypert_tokens", "transformers").main([])
    assert "aomoa on 4 layers" in capsys.readouterr().out
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_new_sensor(capsys: pytest.CaptureFixture[str]) -> None:
    losses, right = example("new_sensor", "safetensors").main([])
    assert "11 bands" in capsys.readouterr().out
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert right > 0.8


def test_new_sensor_from_a_checkpoint(tmp_path: Path) -> None:
    module = example("new_sensor", "safetensors")
    from spectralx.checkpoints import save

    torch.manual_seed(0)
    stage1 = module.small_stage1()
    model = module.model_for([0.5, 0.6, 0.7], save(tmp_path, stage1))
    name = "blocks.3.mlp.fc1.gate"
    stage1.get_parameter(name).data.fill_(3.0)
    again = module.model_for([0.5, 0.6, 0.7], save(tmp_path, stage1))
    assert not model.get_parameter(f"vit_backbone.{name}").any()
    assert again.get_parameter(f"vit_backbone.{name}").eq(3).all()


def test_official_checkpoint(tmp_path: Path) -> None:
    module = example("official_checkpoint", "safetensors")
    classes = module.main(["--out", str(tmp_path / "classes.npy")])
    assert np.array_equal(np.load(tmp_path / "classes.npy"), classes.numpy())

    torch.manual_seed(1)
    bands = [0.5, 0.6, 0.7]
    model = module.Segmentation("scalemae", 3, 5, bands, **module.SMALL).eval()
    module.write_official(model, tmp_path / "official.pth")
    other = module.Segmentation("scalemae", 3, 5, bands, **module.SMALL).eval()
    module.load_official(other, tmp_path / "official.pth")
    images = module.read_image(None, 3, (32, 32))
    assert torch.equal(other(images), model(images))


def test_official_checkpoint_reads_geotiffs(tmp_path: Path) -> None:
    pytest.importorskip("rasterio", reason="rasterio is not installed")
    module = example("official_checkpoint", "safetensors")
    from spectralx.data.raster import write_raster

    values = np.random.default_rng(0).random((3, 20, 30), dtype=np.float32)
    write_raster(tmp_path / "tile.tif", 100 + 50 * values)
    images = module.read_image(tmp_path / "tile.tif", 3, (20, 30))
    low, high = values.min((1, 2), keepdims=True), values.max((1, 2), keepdims=True)
    expected = torch.from_numpy((values - low) / (high - low))[None]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_an_example_is_a_command() -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    command = [sys.executable, str(FOLDER / "official_checkpoint.py"), "--family", "dinov3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "share of each class" in done.stdout
