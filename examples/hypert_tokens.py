"""HyperT in front of someone else's encoder: a ViT of transformers that sees any bands.

    python examples/hypert_tokens.py
    python examples/hypert_tokens.py --width 768 --layers 12 --heads 12 --side 224 --stem 512

Images are of one material each, a bump in its spectrum; the class is the material.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from spectralx import adapt, freeze, trainable_parameters
from spectralx_kernels import HyperT

WAVELENGTHS = [0.45 + 0.05 * band for band in range(12)]  # micrometres, one a band


class Tokens(nn.Module):
    """A patch embedding made of HyperT: images [B, C, H, W] to tokens [B, N, D]."""

    def __init__(self, hypert: HyperT) -> None:
        super().__init__()
        self.hypert = hypert

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.hypert(images)[0]
        return tokens

    @property
    def projection(self) -> nn.Module:
        """What transformers asks for the dtype of the images."""
        return self.hypert.down


def make_batch(size: int, side: int) -> tuple[Tensor, Tensor]:
    """Images [size, 12, side, side] and classes [size]: your data here."""
    labels = torch.randint(0, 3, (size,))
    centres = torch.tensor([0.5, 0.7, 0.9])[labels]
    spectra = torch.exp(-(((torch.tensor(WAVELENGTHS) - centres[:, None]) / 0.1) ** 2))
    return spectra[:, :, None, None] + 0.2 * torch.rand(size, 12, side, side), labels


def make_model(options: argparse.Namespace) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        image_size=options.side,
        num_labels=3,
    )
    model = ViTForImageClassification(config)  # or .from_pretrained(...)
    hypert = HyperT(
        len(WAVELENGTHS),
        WAVELENGTHS,
        embed_dim=options.width,
        image_size=options.side,
        stem_dim=options.stem,
        trainable="all",
    )
    # timm: model.patch_embed = Tokens(hypert)
    model.vit.embeddings.patch_embeddings = Tokens(hypert)
    return model


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=64, help="of a token")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--stem", type=int, default=32, help="channels of HyperT's stem")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = make_model(options)
    print(adapt(model, method="aomoa"))
    freeze(model, keep=r"^classifier\.|cls_token|position_embeddings")
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-3)
    losses = []
    for _ in range(options.steps):
        images, labels = make_batch(options.batch, options.side)
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} after {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()
