"""Drop-in modules over an upsampled map that is never handed around."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectralx_kernels.upsample.convolution import upsample_conv2d
from spectralx_kernels.upsample.prediction import upsample_cross_entropy


class UpsampleConv2d(nn.Conv2d):
    """``nn.Conv2d`` of the bilinearly upsampled input; the same parameters and state dict.

    Takes the place of a resize followed by a convolution of stride 1.

    Parameters
    ----------
    in_channels, out_channels : as in ``nn.Conv2d``.
    kernel_size : odd, rows and columns.
    padding : zeros around the upsampled map; half the kernel if None.
    bias : whether there is one.
    align_corners, algorithm : see `upsample_conv2d`.

    Raises
    ------
    ValueError : an even kernel or an unknown algorithm, when called.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        padding: int | tuple[int, int] | None = None,
        bias: bool = True,
        align_corners: bool = False,
        algorithm: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if padding is None:
            sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
            padding = (sides[0] // 2, sides[1] // 2)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            padding=padding,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.align_corners = align_corners
        self.algorithm = algorithm

    def forward(self, x: Tensor, size: int | Sequence[int]) -> Tensor:  # type: ignore[override]
        """[B, in, h, w] -> [B, out, H, W] where `size` is (H, W) and the padding is the default."""
        assert not isinstance(self.padding, str)
        return upsample_conv2d(
            x,
            self.weight,
            self.bias,
            size=size,
            padding=self.padding,
            align_corners=self.align_corners,
            algorithm=self.algorithm,
        )


class UpsampleCrossEntropyLoss(nn.Module):
    """``nn.CrossEntropyLoss`` of logits that are upsampled bilinearly to the size of the labels.

    Parameters
    ----------
    weight : [classes], class weights or None; a buffer, as in ``nn.CrossEntropyLoss``.
    ignore_index, label_smoothing, reduction, align_corners : see `upsample_cross_entropy`.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.align_corners = align_corners

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits [B, classes, h, w], target [B, H, W] -> a scalar, or [B, H, W] for "none"."""
        return upsample_cross_entropy(
            logits,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            align_corners=self.align_corners,
        )
