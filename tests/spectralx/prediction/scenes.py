"""A model that tells places apart, and scenes with something to tell, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rasterio import Affine

from spectralx import checkpoints
from spectralx.data import write_raster
from spectralx.segmentation import Segmentation

WAVELENGTHS = [0.48, 0.56, 0.665, 0.842, 1.61]
CLASS_NAMES = ["unlabelled", "forest", "water", "built-up", "bare & dry"]
SIDE = 32
FIXED = {"kind": "fixed", "mean": [2000.0] * 5, "std": [900.0] * 5}


def build_model(*, bands: int = 5, tokenizer: str | None = None, **sizes: Any) -> Segmentation:
    """A segmentation in evaluation mode whose classes are spread over random images."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "image_size": SIDE,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "stem_dim": 8,
        "tokenizer_heads": 2,
        "low_rank": 4,
        "head_channels": 8,
        **sizes,
    }
    wavelengths = np.linspace(0.45, 0.95, bands).tolist() if bands != 5 else WAVELENGTHS
    model = Segmentation(
        "scalemae",
        bands,
        len(CLASS_NAMES),
        wavelengths,
        adapter="aomoa" if tokenizer is None else None,
        tokenizer=tokenizer,  # type: ignore[arg-type]
        **options,
    ).eval()
    images = torch.from_numpy(pixels(bands, 2 * SIDE, 2 * SIDE)).float().div(4000.0)
    height, width = model.image_size
    images = F.interpolate(images[None], (2 * height, 2 * width), mode="bilinear")
    parts = images.unfold(2, height, height).unfold(3, width, width)  # [1, C, 2, 2, height, width]
    batch = parts.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).contiguous()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = 1.0
        model.train()
        model(batch)  # running statistics of what it will see
        model.eval()
        head = model.head.conv_seg
        assert head.bias is not None
        head.weight.normal_()
        logits = model(batch)
        deviation, mean = torch.std_mean(logits, dim=(0, 2, 3))
        head.weight.div_(deviation[:, None, None, None] + 1e-6)
        head.bias.copy_((head.bias - mean) / (deviation + 1e-6))
        head.bias[0] -= 3.0  # "unlabelled" is hardly ever found, as after training
    return model


def save_model(path: Path, normalisation: dict[str, Any] | None = None, **options: Any) -> Path:
    """The model as a checkpoint."""
    model = build_model(**options)
    return checkpoints.save(
        path,
        model,
        wavelengths=model.config["wavelengths"],
        class_names=CLASS_NAMES,
        normalisation={"kind": "image"} if normalisation is None else normalisation,
    )


def pixels(bands: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Smooth fields of a few scales, uint16 [bands, rows, columns] from 1 on."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(1, bands, rows, columns)
    for scale, strength in ((4, 1.0), (16, 2.0), (48, 3.0)):
        coarse = torch.randn(1, bands, rows // scale + 2, columns // scale + 2, generator=generator)
        total += strength * F.interpolate(coarse, (rows, columns), mode="bilinear")
    values = (2000.0 + 300.0 * total[0]).clamp(1, 9000)
    return values.round().numpy().astype(np.uint16)


def write_scene(path: Path, values: np.ndarray, *, corner: tuple[int, int] = (0, 0),
                **options: Any) -> Path:  # fmt: skip
    """A scene of 10 m pixels whose first pixel is `corner` (row, column) of a larger one."""
    row, column = corner
    stated: dict[str, Any] = {
        "crs": "EPSG:32650",
        "transform": Affine(10.0, 0.0, 300_000.0 + 10 * column, 0.0, -10.0, 4e6 - 10 * row),
        "descriptions": [f"{wavelength} um" for wavelength in WAVELENGTHS[: len(values)]],
    }
    write_raster(path, values, **(stated | options))
    return path
