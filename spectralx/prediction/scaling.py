"""Raw pixels on the device to what the model sees."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralx.data.normalise import Scaling
from spectralx.data.samples import mix_bands
from spectralx.prediction.scene import EXACT_DTYPES, SceneReading


class Scaler:
    """Raw tiles on the device to what the model sees.

    Parameters
    ----------
    scaling : of the bands.
    reading : says which values are missing.
    size : height and width that the model sees; tiles of another size are resized bilinearly, as
        training resizes.
    """

    def __init__(
        self, scaling: Scaling, reading: SceneReading, size: tuple[int, int], device: torch.device
    ) -> None:
        self.low, self.inverse = (
            torch.from_numpy(values)[:, None, None].to(device)
            for values in (scaling.low, scaling.inverse)
        )
        self.clipped = scaling.clipped
        mixing = scaling.mixing
        self.mixing = None if mixing is None else torch.from_numpy(mixing).to(device)
        exact = reading.info.dtype in EXACT_DTYPES
        self.floating = not exact or reading.info.dtype == "float32"
        nodata = reading.nodata
        self.nodata: float | None = None
        if exact and nodata is not None and math.isfinite(nodata):
            self.nodata = float(np.asarray(nodata).astype(reading.info.dtype))
        self.size = size

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels [B, C, h, w] of any type to float32 [B, C, *size], 0 where they are missing."""
        values = pixels.to(torch.float32)
        missing = None
        if self.floating:
            missing = ~torch.isfinite(values)
        if self.nodata is not None:
            equal = values == self.nodata
            missing = equal if missing is None else missing.logical_or_(equal)
        scaled = (values - self.low).mul_(self.inverse)
        if self.clipped:
            scaled = scaled.clamp_(0.0, 1.0)
        if missing is not None:
            scaled = scaled.masked_fill_(missing, 0.0)
        if self.mixing is not None:
            scaled = mix_bands(scaled, self.mixing)
            if missing is not None:
                scaled = scaled.masked_fill_(missing, 0.0)
        if tuple(scaled.shape[-2:]) != self.size:
            scaled = F.interpolate(scaled, size=self.size, mode="bilinear", align_corners=False)
        return scaled
