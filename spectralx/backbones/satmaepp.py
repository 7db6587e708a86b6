"""The part of SatMAE++ that its masked autoencoder adds to MAE: a learned 2x upsampling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from spectralx.backbones.channel_norm import ChannelNorm


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a ReLU between; half of their result is added to the input.

    Parameters
    ----------
    channels : channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]."""
        out: Tensor = x + 0.5 * self.conv2(F.relu(self.conv1(x)))
        return out


class UpsamplingBlock(nn.Module):
    """Maps of twice the side: transposed convolution, residual block, and a 3x3 convolution out.

    Parameters
    ----------
    channels : channels of the map in.
    out_channels : channels of the image out.

    Source: SpectralX, stage 1 with SatMAE++.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.up_norm = ChannelNorm(channels)
        self.res_block = ResidualBlock(channels)
        self.res_norm = ChannelNorm(channels)
        self.proj_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out_channels, 2H, 2W]."""
        x = F.leaky_relu(self.up_norm(self.up_conv(x)))
        out: Tensor = self.proj_out(self.res_norm(self.res_block(x)))
        return out
