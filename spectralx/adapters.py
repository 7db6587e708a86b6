"""Layers that stand beside a frozen one: LoRA, SLR and IA3, for linear and patch layers.

They are the baselines SpectralX is compared with. Names of parameters are the published ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from spectralx_kernels import PatchConv2d

DEFAULT_RANK = 16


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected at least 1")


def _ones(size: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.ones(size, device=like.device, dtype=like.dtype))


class LinearAdapter(nn.Module):
    """Base of what stands in for a linear layer: the layer, frozen, as ``.linear``.

    ``weight``, ``bias``, ``in_features`` and ``out_features`` are the frozen layer's, for models
    that ask their layers for a dtype or a width.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features


class ConvAdapter(nn.Module):
    """Base of what stands in for a patch convolution: the layer, frozen, as ``.proj``.

    ``weight`` and ``bias`` are the frozen layer's.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.proj = conv.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.proj.weight

    @property
    def bias(self) -> Tensor | None:
        return self.proj.bias


class LoRALinear(LinearAdapter):
    """A frozen linear layer plus a trained low-rank one: ``linear(x) + up(down(x))``.

    Parameters
    ----------
    linear : the layer to adapt; kept as ``.linear``, its parameters are frozen.
    rank : width between ``down`` and ``up``. ``up`` starts at zero, so a new layer changes
        nothing.

    Raises
    ------
    ValueError : `rank` is below 1.

    Source: SpectralX, baselines of the comparison.
    """

    def __init__(self, linear: nn.Linear, *, rank: int = DEFAULT_RANK) -> None:
        _check_rank(rank)
        super().__init__(linear)
        factory: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.down = nn.Linear(linear.in_features, rank, **factory)
        self.up = nn.Linear(rank, linear.out_features, **factory)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        out: Tensor = self.linear(x) + self.up(self.down(x))
        return out


class SLRLinear(LoRALinear):
    """Scaled low rank: LoRA between a scale of the input and a scale of the output.

    ``out_scaler * (linear(s) + up(down(s)))`` with ``s = in_scaler * x``; both scales start at
    one. Parameters as in `LoRALinear`.

    Source: SpectralX, baselines of the comparison.
    """

    def __init__(self, linear: nn.Linear, *, rank: int = DEFAULT_RANK) -> None:
        super().__init__(linear, rank=rank)
        self.in_scaler = _ones(linear.in_features, linear.weight)
        self.out_scaler = _ones(linear.out_features, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.out_scaler * super().forward(self.in_scaler * x)


class IA3Linear(LinearAdapter):
    """A frozen linear layer of a rescaled input: ``linear(in_scaler * x)``; scales start at one.

    Parameters
    ----------
    linear : the layer to adapt; kept as ``.linear``, its parameters are frozen.

    Source: SpectralX, baselines of the comparison.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.in_scaler = _ones(linear.in_features, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        out: Tensor = self.linear(self.in_scaler * x)
        return out


def _split_side(side: int) -> tuple[int, int]:
    """Two factors of a patch side, as close as can be, the smaller one first (16: 4 and 4)."""
    small = max(f for f in range(1, math.isqrt(side) + 1) if side % f == 0)
    return small, side // small


def _check_patch_convolution(conv: nn.Conv2d) -> None:
    plain = conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1
    if conv.kernel_size != conv.stride or not plain:
        raise ValueError(
            f"conv: got {conv}, expected a patch convolution (stride equal to the kernel, "
            "no padding, no dilation, one group)"
        )


class LoRAConv2d(ConvAdapter):
    """A frozen patch convolution plus a low-rank one of two strided steps, ``up(down(x))``.

    Parameters
    ----------
    conv : convolution whose stride is its kernel size; kept as ``.proj``, its parameters are
        frozen. Each side is split into two factors: a 16x16 patch into 4x4 of 4x4.
    rank : channels between ``down`` and ``up``. ``up`` starts at zero.

    Raises
    ------
    ValueError : `conv` overlaps, pads, dilates or has groups; `rank` is below 1.

    Source: SpectralX, baselines of the comparison.
    """

    def __init__(self, conv: nn.Conv2d, *, rank: int = DEFAULT_RANK) -> None:
        _check_rank(rank)
        _check_patch_convolution(conv)
        super().__init__(conv)
        factory: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        height, width = (_split_side(side) for side in conv.kernel_size)
        inner, outer = (height[0], width[0]), (height[1], width[1])
        self.down = PatchConv2d(conv.in_channels, rank, inner, **factory)
        self.up = PatchConv2d(rank, conv.out_channels, outer, **factory)
        nn.init.zeros_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to [B, D, H / patch, W / patch]."""
        out: Tensor = self.proj(x) + self.up(self.down(x))
        return out


class SLRConv2d(LoRAConv2d):
    """`LoRAConv2d` with a trained scale of every output channel, ``scaler``, one at the start.

    Source: SpectralX, baselines of the comparison.
    """

    def __init__(self, conv: nn.Conv2d, *, rank: int = DEFAULT_RANK) -> None:
        super().__init__(conv, rank=rank)
        self.scaler = _ones(conv.out_channels, conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to [B, D, H / patch, W / patch]."""
        return self.scaler[:, None, None] * super().forward(x)


class IA3Conv2d(ConvAdapter):
    """A frozen convolution of rescaled bands, ``proj(in_scaler * x)``; scales start at one.

    Parameters
    ----------
    conv : the convolution to adapt; kept as ``.proj``, its parameters are frozen.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.in_scaler = _ones(conv.in_channels, conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to [B, D, H', W']."""
        out: Tensor = self.proj(self.in_scaler[:, None, None] * x)
        return out
