"""AoMoA: attribute-oriented mixture of adapters on a frozen linear layer."""

from spectralx_kernels.aomoa.modules import AoMoALinear
from spectralx_kernels.aomoa.ops import aomoa, balance_loss, noisy_topk_gating

__all__ = ["AoMoALinear", "aomoa", "balance_loss", "noisy_topk_gating"]
