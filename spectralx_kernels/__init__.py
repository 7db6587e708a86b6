"""Fused operators and drop-in modules of SpectralX for PyTorch."""

from spectralx_kernels._backends import show_backends, use_backend
from spectralx_kernels._official_names import (
    OfficialNames,
    OfficialTensor,
    official_inert,
    official_parameters,
)
from spectralx_kernels.aomoa import AoMoALinear, aomoa, balance_loss, noisy_topk_gating

__version__ = "0.1.0"

__all__ = [
    "AoMoALinear",
    "OfficialNames",
    "OfficialTensor",
    "aomoa",
    "balance_loss",
    "noisy_topk_gating",
    "official_inert",
    "official_parameters",
    "show_backends",
    "use_backend",
]
