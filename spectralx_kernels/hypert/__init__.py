"""HyperT: the spatial-spectral tokenizer."""

from spectralx_kernels.hypert.modules import HyperT, SpatialSpectralTokenizer
from spectralx_kernels.hypert.ops import attribute_match, lift_convolution, window_attention

__all__ = [
    "HyperT",
    "SpatialSpectralTokenizer",
    "attribute_match",
    "lift_convolution",
    "window_attention",
]
