"""AoMoA in a vision transformer of transformers, and the loop that trains it.

    python examples/transformers_vit.py
    python examples/transformers_vit.py --pretrained google/vit-base-patch16-224-in21k --side 224

Images are noise in which one band is brighter; the class is that band.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from spectralx import adapt, freeze, trainable_parameters


def make_batch(size: int, side: int) -> tuple[Tensor, Tensor]:
    """Images [size, 3, side, side] and classes [size]: your data here."""
    labels = torch.randint(0, 3, (size,))
    images = torch.rand(size, 3, side, side)
    images[torch.arange(size), labels] += 1.0
    return images, labels


def make_model(pretrained: str | None, side: int) -> ViTForImageClassification:
    if pretrained is not None:
        return ViTForImageClassification.from_pretrained(
            pretrained, num_labels=3, ignore_mismatched_sizes=True
        )
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=side,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def train(model: ViTForImageClassification, steps: int, batch: int, side: int) -> list[float]:
    """Adapt the last two blocks, train adapters, norms and head; the loss of every step."""
    depth = model.config.num_hidden_layers
    print(adapt(model, method="aomoa", blocks=[depth - 2, depth - 1]))
    freeze(model, keep=r"^classifier\.")
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=5e-3)
    losses = []
    for _ in range(steps):
        images, labels = make_batch(batch, side)
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pretrained", help="name or folder of a ViT; random weights without")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = make_model(options.pretrained, options.side)
    losses = train(model, options.steps, options.batch, options.side)
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} after {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()
