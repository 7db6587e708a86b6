"""The part of SatMAE++ that its masked autoencoder adds to MAE: a learned 2x upsampling."""

from __future__ import annotations

from torch import Tensor, nn

from spectralx.backbones.channel_norm import ChannelNorm
from spectralx_kernels import channel_norm, channel_norm_conv2d


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

    def forward(self, x: Tensor, norm: ChannelNorm) -> Tensor:
        """The block behind ``leaky_relu(norm(x))``; maps [B, C, H, W].

        Norm and leaky ReLU are formed where they are used, twice, and kept nowhere.
        """
        convolved = channel_norm_conv2d(x, norm, self.conv1, after="leaky_relu")
        convolved = channel_norm_conv2d(convolved, None, self.conv2, after="relu")
        return channel_norm(x, norm, after="leaky_relu", addend=convolved, scale=0.5)


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

    def forward(self, x: Tensor, norm: ChannelNorm) -> Tensor:
        """The block behind ``norm(gelu(x))``: [B, channels, H, W] to [B, out_channels, 2H, 2W]."""
        x = channel_norm_conv2d(x, norm, self.up_conv, before="gelu")
        x = self.res_block(x, self.up_norm)
        return channel_norm_conv2d(x, self.res_norm, self.proj_out)
