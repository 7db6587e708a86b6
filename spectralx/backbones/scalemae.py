"""ScaleMAE's decoder after its transformer: a two-level pyramid and a head for each level."""

from __future__ import annotations

from torch import Tensor, nn

from spectralx.backbones.channel_norm import ChannelNorm
from spectralx_kernels import (
    channel_norm,
    channel_norm_conv2d,
    gelu_grouped_conv2d,
    pixel_head,
)


class _NamedNorm(nn.Module):
    """A channel norm one level down, where published checkpoints keep it (``.ln``)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ln = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ln(x)
        return out


class FeaturePyramid(nn.Module):
    """A map at four times and at twice its side.

    Parameters
    ----------
    channels : channels of the map in and of both maps out.

    Source: SpectralX, stage 1 with ScaleMAE.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
            _NamedNorm(channels),
            nn.GELU(),
            nn.ConvTranspose2d(channels, channels, 2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(channels, channels, 2, stride=2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] to the high [B, C, 4H, 4W] and the low map [B, C, 2H, 2W]."""
        double, norm, _, again = self.fpn1
        assert isinstance(norm, _NamedNorm)
        assert isinstance(again, nn.ConvTranspose2d)
        high = channel_norm_conv2d(double(x), norm.ln, again, after="gelu")
        return high, self.fpn2(x)


def _pair(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.get_parameter("weight"), layer.get_parameter("bias")


def _grouped_convolution(channels: int) -> nn.Conv2d:
    """A 3x3 convolution to half the channels, each from its own two."""
    return nn.Conv2d(channels, channels // 2, 3, padding=1, groups=channels // 2)


class _ConvBlock(nn.Module):
    """A grouped 3x3 convolution to half the width and back, beside a 1x1 one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.GELU(),
            _grouped_convolution(channels),
            nn.GELU(),
            nn.Conv2d(channels // 2, channels, 1),
        )
        self.residual = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, grouped, _, widen = self.convs
        out: Tensor = widen(gelu_grouped_conv2d(x, _pair(grouped)))
        out += self.residual(x)
        return out


class ConvHead(nn.Module):
    """From a level of the pyramid to an image of eight times its side.

    Parameters
    ----------
    channels : channels of the map in.
    dim : width inside; a multiple of 4.
    layers : number of grouped-convolution blocks.
    out_channels : bands of the image out.

    Raises
    ------
    ValueError : `dim` is no multiple of 4.

    Source: SpectralX, stage 1 with ScaleMAE.
    """

    def __init__(self, channels: int, dim: int, layers: int, out_channels: int) -> None:
        super().__init__()
        if dim < 4 or dim % 4:
            raise ValueError(f"dim: got {dim}, expected a positive multiple of 4")
        self.proj = nn.Conv2d(channels, dim, 1)
        self.conv_blocks = nn.Sequential(*(_ConvBlock(dim) for _ in range(layers)))
        self.pred = nn.Sequential(
            _NamedNorm(dim),
            nn.ConvTranspose2d(dim, dim // 2, 4, stride=4),
            nn.GELU(),
            _grouped_convolution(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 4, dim // 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, out_channels, 2, stride=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out_channels, 8H, 8W]."""
        norm, *layers = self.pred
        assert isinstance(norm, _NamedNorm)
        x = channel_norm(self.conv_blocks(self.proj(x)), norm.ln)
        return pixel_head(x, *(_pair(layer) for layer in layers[::2]))
