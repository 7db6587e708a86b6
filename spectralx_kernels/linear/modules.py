"""`Linear`: ``nn.Linear`` by `linear`."""

from __future__ import annotations

from torch import Tensor, nn

from spectralx_kernels.linear.ops import linear


class Linear(nn.Linear):
    """``nn.Linear`` by `spectralx_kernels.linear`; arguments and state dict are the same."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to [..., O]."""
        return linear(x, self.weight, self.bias)
