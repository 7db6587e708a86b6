"""The published parameter count (ViT-L, the decoder left out): 11.8 M, part by part."""

from __future__ import annotations

from math import prod

import torch

from spectralx.segmentation import Segmentation
from spectralx_kernels import official_inert

# Gradients reach neither the value half of the Are-adapter's key-value projections nor what
# follows it, so these exist in the published model alone.
VALUE_HALVES = 256 * 512 + 392 * 784


def test_trainable_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        model = Segmentation("scalemae", 32, 25, [0.46 + 0.015 * band for band in range(32)])
    trainable: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        if part not in ("neck", "head"):
            total += parameter.numel()
            trainable[part] = trainable.get(part, 0) + parameter.numel() * parameter.requires_grad
    inert = sum(
        prod(shape) for name, shape in official_inert(model).items() if name.startswith("AreApt.")
    )
    ours = sum(trainable.values())
    print(f"{ours:,} of {total:,} train; {inert + VALUE_HALVES:,} more in the published model")
    assert trainable == {"vit_backbone": 8_136_976, "AreApt": 2_647_081}
    assert ours / total < 0.04
    assert round((ours + inert + VALUE_HALVES) / 1e6, 1) == 11.8
