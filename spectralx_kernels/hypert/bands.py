"""Weights of a convolution of bands for the bands of another sensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectralx_kernels.linear import PatchConv2d


def resampling(trained: Sequence[float], new: Sequence[float]) -> Tensor:
    """[trained, new] in float64: the spectrum of the new bands, at the trained wavelengths.

    Linear between neighbouring wavelengths, constant beyond the first and last. The n-th trained
    band of a wavelength takes the n-th new band of it, or the mean of them where there is none.
    Every row sums to 1.
    """
    places: dict[float, list[int]] = {}  # new bands of a wavelength
    for place, wavelength in enumerate(new):
        places.setdefault(wavelength, []).append(place)
    known = sorted(places)
    shares = torch.zeros(len(trained), len(new), dtype=torch.float64, device="cpu")
    seen: dict[float, int] = {}
    for row, wavelength in enumerate(trained):
        turn = seen.get(wavelength, 0)
        seen[wavelength] = turn + 1
        same = places.get(wavelength, [])
        if turn < len(same):
            shares[row, same[turn]] = 1.0
            continue
        above = next((known_one for known_one in known if known_one >= wavelength), known[-1])
        below = next((known_one for known_one in reversed(known) if known_one <= wavelength), above)
        above = max(above, below)
        share = (wavelength - below) / (above - below) if above > below else 0.0
        for end, weight in ((below, 1.0 - share), (above, share)):
            for place in places[end]:
                shares[row, place] += weight / len(places[end])
    return shares


def resampled_convolution(
    convolution: nn.Conv2d, trained: Sequence[float], new: Tensor
) -> PatchConv2d:
    """`convolution` of patches of the trained bands for the new ones, frozen; one unit."""
    weight = convolution.weight.detach()  # [M, trained, k, k]
    shares = resampling(trained, new.tolist()).to(weight.device)
    changed = PatchConv2d(
        len(new),
        convolution.out_channels,
        weight.shape[2:],  # type: ignore[arg-type]
        device=weight.device,
        dtype=weight.dtype,
    )
    mixed = torch.einsum("mtyx,tn->mnyx", weight.to(shares.dtype), shares)
    with torch.no_grad():
        changed.weight.copy_(mixed)
        if changed.bias is not None and convolution.bias is not None:
            changed.bias.copy_(convolution.bias)
    return changed.requires_grad_(False)
