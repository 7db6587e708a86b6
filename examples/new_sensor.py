"""A new sensor: its bands and wavelengths in, an adapted model out.

    python examples/new_sensor.py
    python examples/new_sensor.py --wavelengths 0.49 0.56 0.665 0.842 --stage1 runs/stage1/best

What was learnt on another sensor (stage 1: blocks, adapters, norms) is kept; what depends on the
bands starts anew. Images show two materials side by side; every pixel's class is its material.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralx import trainable_parameters
from spectralx.checkpoints import Checkpoint, initialise_from_stage1, load
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation

CLASSES = 3  # 0 is "unlabelled"
# Sentinel-2, micrometres.
SENTINEL2 = [0.443, 0.49, 0.56, 0.665, 0.705, 0.74, 0.783, 0.842, 0.865, 1.61, 2.19]
# What the stage-1 model of this example was "trained" on: 32 bands of a hyperspectral sensor.
OLD_SENSOR = [0.466 + 0.0153 * band for band in range(32)]
SMALL: dict[str, Any] = {
    "family": "scalemae",
    "image_size": 32,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
}
SMALL_TOKENIZER = {"stem_dim": 16, "num_heads": 2}


def small_stage1() -> MaskedReconstruction:
    """A model of stage 1 for the old sensor, of random weights."""
    return MaskedReconstruction(
        in_channels=len(OLD_SENSOR),
        wavelengths=OLD_SENSOR,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
        fcn_dim=8,
        fcn_layers=1,
        tokenizer_options=SMALL_TOKENIZER,
        **SMALL,
    )


def model_for(wavelengths: Sequence[float], stage1: MaskedReconstruction | Path) -> Segmentation:
    """A segmentation model for bands centred at `wavelengths`, starting from `stage1`."""
    source: MaskedReconstruction | Checkpoint
    source = load(stage1) if isinstance(stage1, Path) else stage1
    names = ("family", "image_size", "embed_dim", "depth", "num_heads", "resolution")
    config = {name: source.config[name] for name in names}
    tokenizer = source.config["tokenizer_options"] or {}
    if "num_heads" in tokenizer:
        config["tokenizer_heads"] = tokenizer["num_heads"]
    if "stem_dim" in tokenizer:
        config["stem_dim"] = tokenizer["stem_dim"]
    model = Segmentation(
        in_channels=len(wavelengths),
        num_classes=CLASSES,
        wavelengths=wavelengths,
        head_channels=max(config["embed_dim"] // 2, 8),
        trainable="adapters",
        **config,
    )
    print(initialise_from_stage1(model, source))
    return model


def make_batch(wavelengths: Sequence[float], size: int, side: int) -> tuple[Tensor, Tensor]:
    """Images [size, C, side, side] and labels [size, side, side]: your data here."""
    bands = torch.tensor(wavelengths)
    spectra = torch.stack([torch.exp(-(((bands - at) / 0.15) ** 2)) for at in (0.55, 0.85)])
    labels = torch.ones(size, side, side, dtype=torch.long)
    columns = torch.randint(side // 4, 3 * side // 4, (size, 1, 1))
    labels[(torch.arange(side) >= columns).expand(size, side, side)] = 2
    images = spectra[labels - 1].permute(0, 3, 1, 2)
    return images + 0.1 * torch.rand_like(images), labels


def main(argv: Sequence[str] | None = None) -> tuple[list[float], float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wavelengths", type=float, nargs="+", default=SENTINEL2)
    parser.add_argument("--stage1", type=Path, help="folder of a stage-1 checkpoint")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = model_for(options.wavelengths, options.stage1 or small_stage1())
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=5e-3)
    losses = []
    for _ in range(options.steps):
        images, labels = make_batch(options.wavelengths, options.batch, model.image_size[0])
        loss = model.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    images, labels = make_batch(options.wavelengths, options.batch, model.image_size[0])
    right = (model.predict(images) == labels).float().mean().item()  # as in training: batch norms
    print(
        f"{len(options.wavelengths)} bands: loss {losses[0]:.3f} at the start, {losses[-1]:.3f} "
        f"after {len(losses)} steps; {100 * right:.0f} % of the pixels of new images are right"
    )
    return losses, right


if __name__ == "__main__":
    main()
