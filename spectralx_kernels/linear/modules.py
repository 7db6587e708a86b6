"""`Linear` and `PatchConv2d`: torch's layers by `linear` and `patch_conv2d`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralx_kernels.linear.ops import linear, patch_conv2d


class Linear(nn.Linear):
    """``nn.Linear`` by `spectralx_kernels.linear`; arguments and state dict are the same."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to [..., O]."""
        return linear(x, self.weight, self.bias)


class PatchConv2d(nn.Conv2d):
    """``nn.Conv2d`` of patches side by side, without padding, by `patch_conv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, bias, device, dtype : as those of ``nn.Conv2d``, whose
        state dict it has.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=kernel_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] to [B, O, H // k, W // k]."""
        return patch_conv2d(x, self.weight, self.bias)
