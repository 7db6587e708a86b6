"""A whole model small enough for thousands of training steps, and one step of it."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralx.segmentation import Segmentation

BANDS, CLASSES, SIDE = 4, 3, 32


def tiny_model(seed: int = 0) -> Segmentation:
    """Stage 2 with HyperT, AoMoA, the Are-adapter and UPerNet, everything training."""
    torch.manual_seed(seed)
    model = Segmentation(
        family="scalemae",
        in_channels=BANDS,
        num_classes=CLASSES,
        wavelengths=[0.49, 0.56, 0.66, 0.84],
        image_size=SIDE,
        embed_dim=16,
        depth=1,
        feature_blocks=[0],
        adapted_blocks=[0],
        num_heads=2,
        stem_dim=8,
        tokenizer_heads=2,
        low_rank=4,
        head_channels=8,
        trainable="all",
    )
    return model.train()


def adamw(model: Segmentation) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images [2, C, side, side] and labels [2, side, side] of a step."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(2, BANDS, SIDE, SIDE, generator=generator)
    return images, torch.randint(0, CLASSES, (2, SIDE, SIDE), generator=generator)


def train_step(model: Segmentation, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step on the batch of that number; the loss."""
    device = next(model.parameters()).device
    images, labels = (each.to(device) for each in batch(step))
    optimizer.zero_grad(set_to_none=True)
    loss = model.loss(images, labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
