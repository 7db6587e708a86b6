"""AoMoA: attribute-oriented mixture of adapters on a frozen linear layer."""

from spectralx_kernels.aomoa.modules import AoMoALinear
from spectralx_kernels.aomoa.ops import aomoa, balance_loss, noisy_topk_gating
from spectralx_kernels.aomoa.statistics import RoutingStatistics

__all__ = ["AoMoALinear", "RoutingStatistics", "aomoa", "balance_loss", "noisy_topk_gating"]
