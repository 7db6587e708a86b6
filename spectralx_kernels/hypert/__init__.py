"""HyperT: the spatial-spectral tokenizer."""

from spectralx_kernels.hypert.attention import attribute_match, window_attention
from spectralx_kernels.hypert.modules import HyperT, SpatialSpectralTokenizer
from spectralx_kernels.hypert.ops import lift_convolution

__all__ = [
    "HyperT",
    "SpatialSpectralTokenizer",
    "attribute_match",
    "lift_convolution",
    "window_attention",
]
