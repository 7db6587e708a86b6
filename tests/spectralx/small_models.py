"""Models of both stages small enough for tests of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralx import checkpoints
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation

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


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / checkpoints.MANIFEST).read_text())
    return found
