"""The convolutions before both branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralx_kernels.hypert.stem import Pair, residual_halving

STRIDE = 8
LIFT, MIDDLE, WIDE = 64, 128, 256  # channels, before stem_dim


def _pair(module: nn.Module) -> Pair:
    return module.get_parameter("weight"), module.get_parameter("bias")


def _prepared(convolution: nn.Module, norm: nn.BatchNorm2d) -> tuple[Pair, Pair | None]:
    """Weights of the convolution, and of a norm by the batch's statistics behind it.

    A norm by running statistics is linear: it goes into the convolution's weights.
    """
    weight, bias = _pair(convolution)
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None:
        return (weight, bias), _pair(norm)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = norm.weight.to(wide) * torch.rsqrt(variance.to(wide) + norm.eps)
    folded = weight.to(wide) * scale[:, None, None, None]
    shifted = (bias.to(wide) - mean.to(wide)) * scale + norm.bias.to(wide)
    return (folded.to(weight.dtype), shifted.to(bias.dtype)), None


def _update(norm: nn.BatchNorm2d, table: Tensor, count: int) -> None:
    """Running statistics from a table of `residual_halving` over `count` values a channel."""
    mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if not norm.training or mean is None or variance is None or count == 0:
        return
    with torch.no_grad():
        if batches is not None:
            batches.add_(1)
        unbiased = table[1] * (count / max(count - 1, 1))
        mean.lerp_(table[0].to(mean.dtype), norm.momentum or 0.0)
        variance.lerp_(unbiased.to(variance.dtype), norm.momentum or 0.0)


class Stem(nn.Module):
    """[B, C, H, W] -> [B, stem_dim, H/8, W/8]."""

    def __init__(self, in_channels: int, stem_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, LIFT, 1)
        self.module1 = self._residual(LIFT)
        self.module2 = self._halve(LIFT, MIDDLE)
        self.module3 = self._residual(MIDDLE)
        self.module4 = self._halve(MIDDLE, WIDE)
        self.conv2 = nn.Conv2d(WIDE, stem_dim, 3, stride=2, padding=1)

    @staticmethod
    def _residual(channels: int) -> nn.Sequential:
        convolution = nn.Conv2d(channels, channels, 3, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.GELU())

    @staticmethod
    def _halve(channels: int, out_channels: int) -> nn.Sequential:
        convolution = nn.Conv2d(channels, out_channels, 2, stride=2)
        return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    @staticmethod
    def _stage(
        x: Tensor, lift: nn.Module | None, residual: nn.Sequential, halve: nn.Sequential
    ) -> Tensor:
        norm, half_norm = residual[1], halve[1]
        if not (isinstance(norm, nn.BatchNorm2d) and isinstance(half_norm, nn.BatchNorm2d)):
            # Norms over several processes, which the operator does not have.
            x = x if lift is None else lift(x)
            plain: Tensor = halve(x + residual(x))
            return plain
        convolution, with_norm = _prepared(residual[0], norm)
        halving, with_half_norm = _prepared(halve[0], half_norm)
        out, table, half_table = residual_halving(
            x,
            convolution,
            halving,
            lift=None if lift is None else _pair(lift),
            norm=with_norm,
            half_norm=with_half_norm,
            eps=norm.eps,
        )
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        _update(norm, table, pixels)
        _update(half_norm, half_table, pixels // 4)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """The map of images [B, C, H, W], H and W multiples of 8."""
        x = self._stage(images, self.conv1, self.module1, self.module2)
        x = self._stage(x, None, self.module3, self.module4)
        out: Tensor = self.conv2(x)
        return out
