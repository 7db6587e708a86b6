"""Which bands of a scene go into which input of a model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spectralx.cli import InputError
from spectralx.data.normalise import AnyNormalisation, FixedStatistics, ImageMinMax, Whitened
from spectralx.segmentation import Segmentation
from spectralx_kernels import HyperT

# Centres of the same band differ by this much between the satellites of a series and between a
# product's and a handbook's numbers: 5 nm, or 1 % where that is more.
TOLERANCE_UM = 0.005
TOLERANCE_SHARE = 0.01


def match_bands(scene: Sequence[float], model: Sequence[float]) -> list[int] | None:
    """The band of a scene, from 0, for each band of a model; None where one has no counterpart.

    Parameters
    ----------
    scene, model : wavelengths in µm. As many and all alike: as they come. Else each of the model's
        bands takes the nearest of the scene's that is within the tolerance and not yet taken, the
        first of equally near ones; bands in another order, and more bands, are fine so.
    """
    found, wanted = np.asarray(scene, float), np.asarray(model, float)
    reach = np.maximum(TOLERANCE_UM, TOLERANCE_SHARE * wanted)
    if len(found) == len(wanted) and bool((np.abs(found - wanted) <= reach).all()):
        return list(range(len(found)))
    free = np.ones(len(found), dtype=bool)
    chosen: list[int] = []
    for wavelength, most in zip(wanted.tolist(), reach.tolist(), strict=True):
        distance = np.where(free, np.abs(found - wavelength), np.inf)
        if not len(distance) or distance.min() > most:
            return None
        chosen.append(int(distance.argmin()))
        free[chosen[-1]] = False
    return chosen


def choose_bands(
    path: str | Path,
    count: int,
    stated: Sequence[float] | None,
    model: Sequence[float] | None,
    bands: int,
) -> list[int]:
    """The bands of the scene at `path` that the model sees, in its order.

    Parameters
    ----------
    path : named in errors.
    count : bands of the scene.
    stated : their wavelengths in µm, where the file or the user states them.
    model : wavelengths the model was trained on, where they are known.
    bands : number of them.

    Raises
    ------
    InputError : bands that the model was not trained on.
    """
    if stated is not None and len(stated) != count:
        raise InputError(f"{path}: found {count} bands; expected {len(stated)}, as wavelengths")
    if stated is None or model is None:
        if count != bands:
            raise InputError(
                f"{path}: found {count} bands without wavelengths; expected {bands}, as the "
                "checkpoint was trained on, or wavelengths to choose them by"
            )
        return list(range(count))
    chosen = match_bands(stated, model)
    if chosen is None:
        missing = next(
            one for end, one in enumerate(model, 1) if match_bands(stated, model[:end]) is None
        )
        raise InputError(
            f"{path}: found {count} bands from {min(stated):.3f} to {max(stated):.3f} um, none for "
            f"{missing:.3f} um; expected the bands the checkpoint was trained on, or adapt_bands "
            "to resample its tokenizer"
        )
    return chosen


def for_bands(model: Segmentation, wavelengths: Sequence[float]) -> Segmentation:
    """`model` for a scene of other bands, not retrained; see `HyperT.for_bands`.

    Everything but the convolutions that see bands is shared with `model`.

    Raises
    ------
    InputError : a model whose tokenizer is not HyperT.
    """
    tokenizer = model.vit_backbone.patch_embed.proj
    if not isinstance(tokenizer, HyperT):
        raise InputError(
            "adapt_bands: found a checkpoint with a patch convolution; expected one with HyperT"
        )
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, tensors).eval()
    changed.vit_backbone.patch_embed.proj = tokenizer.for_bands(wavelengths)
    changed.in_channels = len(wavelengths)
    return changed


def normalisation_for_bands(
    normalisation: AnyNormalisation,
    trained: Sequence[float],
    wavelengths: Sequence[float],
) -> ImageMinMax | FixedStatistics:
    """Statistics of the trained bands interpolated linearly, by wavelength, to new ones.

    Raises InputError for whitened bands: correlations of other ones are not known.
    """
    if isinstance(normalisation, ImageMinMax):
        return normalisation
    if isinstance(normalisation, Whitened):
        raise InputError(
            "adapt_bands: found a checkpoint with data.normalisation whitened; expected image or "
            "fixed, whose statistics can be interpolated to other bands"
        )
    known, place = np.unique(np.asarray(trained, float), return_inverse=True)
    counts = np.bincount(place)
    mean, std = (
        np.interp(wavelengths, known, np.bincount(place, weights=values) / counts)
        for values in (normalisation.mean, normalisation.std)
    )
    return FixedStatistics(mean.tolist(), std.tolist())
