"""The published parameter count (ViT-L, the decoder left out): 11.8 M, part by part."""

from __future__ import annotations

from math import prod

import torch

from spectralx.segmentation import Segmentation
from spectralx_kernels import official_inert

# Gradients reach neither the value half of the Are-adapter's key-value projections nor what
# follows it, so these exist in the published model alone.
VALUE_HALVES = 256 * 512 + 392 * 784


def part_of(name: str) -> str:
    """Where a parameter of the paper's model counts: a row of the account."""
    if name.startswith("AreApt."):
        return "Are-adapter"
    if name.startswith("vit_backbone.patch_embed."):
        return "HyperT"
    if ".mlp.fc1." in name:
        return "AoMoA on fc1"
    if ".mlp.fc2." in name:
        return "AoMoA on fc2"
    return "norms of the backbone"


def aomoa_parameters(width: int, out: int, experts: int = 4) -> int:
    """The paper's mixture on a linear layer, counted by hand."""
    d, r, h = width // 2, width // 8, width // 64
    norms = 2 * d + 2 * r
    gates = 2 * 2 * r * experts
    mixture = experts * (h * r + h + r * h + r)
    return out + norms + d * r + gates + mixture + r * out // 2


# ViT-L/16, 32 bands; blocks 5, 11, 17 and 23 of 24.
EXPECTED = {
    "AoMoA on fc1": 4 * aomoa_parameters(1024, 4096),
    "AoMoA on fc2": 4 * aomoa_parameters(4096, 1024),
    "norms of the backbone": 24 * 2 * 2 * 1024,
    # down 4x4 of 32 bands to 16, up 4x4 to 1024, scaler
    "HyperT": (16 * 32 * 16 + 16) + (1024 * 16 * 16 + 1024) + 1024,
    "Are-adapter": 2_647_081,
}


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
    account = dict.fromkeys(EXPECTED, 0)
    half = dict.fromkeys(EXPECTED, 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(("neck.", "head.")):
            account[part_of(name)] += parameter.numel()
            half[part_of(name)] += parameter.numel() * (2 if parameter.ndim > 1 else 4)
    for part, count in account.items():
        print(f"{count:>12,}  {4 * count / 1e6:5.1f} MB, {half[part] / 1e6:5.1f} MB half  {part}")
    tokenizer = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if part_of(name) == "HyperT" and not parameter.requires_grad
    )
    print(
        f"a file of adapters takes {4 * ours / 1e6:.1f} MB, {sum(half.values()) / 1e6:.1f} MB in "
        f"half precision; with the frozen tokenizer {4 * tokenizer / 1e6:.1f} MB more"
    )
    print(f"{ours:,} of {total:,} train; {inert + VALUE_HALVES:,} more in the published model")
    assert trainable == {"vit_backbone": 8_136_976, "AreApt": 2_647_081}
    assert account == EXPECTED
    assert (round(4 * ours / 1e6, 1), round(sum(half.values()) / 1e6, 1)) == (43.1, 21.9)
    assert ours / total < 0.04
    assert round((ours + inert + VALUE_HALVES) / 1e6, 1) == 11.8
