"""SpectralX: optical foundation models adapted to multispectral and hyperspectral images.

The method in two stages (`spectralx.reconstruction`, `spectralx.segmentation`), its data
(`spectralx.data`), training (`spectralx.train`) and evaluation (`spectralx.evaluate`). Operators
and drop-in modules are in the package `spectralx_kernels`.
"""

from spectralx_kernels import __version__

__all__ = ["__version__"]
