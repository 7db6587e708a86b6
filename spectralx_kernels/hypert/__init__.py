"""HyperT: the spatial-spectral tokenizer."""

from spectralx_kernels.hypert.attention import attribute_match, window_attention
from spectralx_kernels.hypert.modules import HyperT, SpatialSpectralTokenizer
from spectralx_kernels.hypert.stem import residual_halving

__all__ = [
    "HyperT",
    "SpatialSpectralTokenizer",
    "attribute_match",
    "residual_halving",
    "window_attention",
]
