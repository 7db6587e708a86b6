"""Models from settings: what of them names public weights reaches the loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spectralx.build import initialise, segmentation_model
from spectralx.cli import InputError
from spectralx.options import load_settings
from tests.spectralx.public_files import DEPTH, WIDTH, satmaepp

SIX = [0.45, 0.5, 0.55, 0.6, 0.65, 0.7]


def started(file: Path, wavelengths: list[float], *overrides: str) -> tuple[torch.Tensor, str]:
    """The patch convolution of a model that starts from `file`, and what loading says of it."""
    settings = load_settings(
        None,
        [
            "--model.family=satmae++",
            "--model.adapter=lora",
            f"--model.embed_dim={WIDTH}",
            f"--model.depth={DEPTH}",
            "--model.num_heads=2",
            "--stage2.init_from=null",
            "--stage2.head_channels=8",
            "--stage2.neck_channels=8",
            f"--model.backbone_weights={file}",
            *overrides,
        ],
    )
    model = segmentation_model(settings, wavelengths, 3)
    report = initialise(model, settings)
    assert report is not None
    name = "patch_embed.proj.weight"
    weight = model.get_parameter("vit_backbone.patch_embed.proj.proj.weight").detach()
    return weight, {**report.adapted, **report.missing}.get(name, "as it is")


def test_patch_embedding_of_other_bands_by_the_settings(tmp_path: Path) -> None:
    state = satmaepp()
    torch.save({"model": dict(state)}, tmp_path / "satmaepp.pth")
    file, public = tmp_path / "satmaepp.pth", state["patch_embed.proj.weight"]
    assert started(file, SIX)[1] == "3 bands fitted by wavelength"
    weight, how = started(file, SIX, "--model.backbone_bands=official")
    assert how == "3 bands repeated"
    assert torch.equal(weight, public.repeat(1, 2, 1, 1))
    weight, how = started(file, SIX, "--model.backbone_bands=start")
    assert how == "3 bands in the file, 6 here"
    assert not torch.equal(weight, public.repeat(1, 2, 1, 1))
    # The file's bands the other way round: the same three bands find their own kernels.
    bands = "--model.backbone_wavelengths=[0.47, 0.55, 0.64]"
    weight, how = started(file, [0.64, 0.55, 0.47], bands)
    assert how == "3 bands fitted by wavelength"
    torch.testing.assert_close(weight, public.flip(1))


def test_bands_of_a_backbone_are_one_of_three() -> None:
    with pytest.raises(InputError, match=r"model\.backbone_bands: found rgb"):
        load_settings(None, ["--model.backbone_bands=rgb"])
