"""A linear decoder: classes of each token from its features, and from its neighbours' if asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearDecoder(nn.Module):
    """Feature maps side by side, channel dropout, one 1x1 convolution.

    No norm: what a token says of its class is one linear layer away from the backbone, which is
    easier to fit than a deep decoder where labels are few. With a kernel, each channel first adds a
    weighted sum over the tokens around: few weights, enough to sharpen what a sensor blurs over
    pixels and to make up for labels that lie a part of a pixel beside the image.

    Parameters
    ----------
    in_channels : width of each feature map.
    num_classes : number of classes, the unlabelled one included.
    dropout : probability of dropping a whole channel.
    kernel_size : side of that kernel in tokens, odd; with 1 a token sees itself alone. Its weights
        start at zero, and beyond the border the nearest token stands.

    Raises
    ------
    ValueError : an even kernel.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        dropout: float = 0.1,
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, expected an odd number")
        width = sum(in_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        self.neighbours: nn.Conv2d | None = None
        if kernel_size > 1:
            self.neighbours = nn.Conv2d(
                width,
                width,
                kernel_size,
                padding=kernel_size // 2,
                padding_mode="replicate",
                groups=width,
                bias=False,
            )
            nn.init.zeros_(self.neighbours.weight)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_i, H, W] to logits [B, classes, H, W]."""
        x = torch.cat(list(features), dim=1)
        if self.neighbours is not None:
            x = x + self.neighbours(x)
        logits: Tensor = self.conv_seg(self.dropout(x))
        return logits
