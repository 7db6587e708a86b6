"""A linear decoder: classes of each token from its features alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LinearDecoder(nn.Module):
    """Feature maps side by side, channel dropout, one 1x1 convolution.

    No norm and no neighbourhood: what a token says of its class is one linear layer away from the
    backbone, which is easier to fit than a deep decoder where labels are few.

    Parameters
    ----------
    in_channels : width of each feature map.
    num_classes : number of classes, the unlabelled one included.
    dropout : probability of dropping a whole channel.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(sum(in_channels), num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_i, H, W] to logits [B, classes, H, W]."""
        logits: Tensor = self.conv_seg(self.dropout(torch.cat(list(features), dim=1)))
        return logits
