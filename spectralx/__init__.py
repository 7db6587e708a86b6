"""SpectralX: optical foundation models adapted to multispectral and hyperspectral images.

`adapt` puts adapters into any model with linear layers. The method in two stages is in
`spectralx.reconstruction` and `spectralx.segmentation`, its data in `spectralx.data`, training in
`spectralx.train`, evaluation in `spectralx.evaluate` and maps of scenes in `spectralx.predict`.
Operators and drop-in modules are in the package `spectralx_kernels`.
"""

from spectralx.adapt import adapt, adapter_blocks, freeze, trainable_parameters, unadapt
from spectralx_kernels import __version__

__all__ = ["__version__", "adapt", "adapter_blocks", "freeze", "trainable_parameters", "unadapt"]
