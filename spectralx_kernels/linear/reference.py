"""A linear layer in plain PyTorch: the specification and the ``eager`` backend."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., D] -> [.., O] by weight [O, D] and bias [O]."""
    return F.linear(x, weight, bias)
