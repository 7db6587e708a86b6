"""Stage 1's losses: what each family computes from its predictions, the images and the mask.

SatMAE++: 0.6 x masked patches + 0.4 x the image of twice the side. ScaleMAE: high frequencies at
twice the side + low frequencies. ``fwd+bwd`` differentiates the predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.case import Case, Draw, Setting, Tensors, rotating
from benchmarks.shapes import FORWARD, ReconstructionShape
from spectralx_kernels import band_reconstruction_loss, masked_patch_loss, upsampled_l1_loss

MASKED_SHARE = 0.75


def satmaepp(
    patches: Tensor, upsampled: Tensor, images: Tensor, mask: Tensor, *, patch: int,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Loss of the SatMAE++ family."""
    masked = masked_patch_loss(patches, images, mask, patch, backend=backend)
    return 0.6 * masked + 0.4 * upsampled_l1_loss(upsampled, images, backend=backend)


def scalemae(
    high: Tensor, low: Tensor, images: Tensor, mask: Tensor, *, backend: str | None = None
) -> Tensor:
    """Loss of the ScaleMAE family."""
    return band_reconstruction_loss(high, low, images, mask, backend=backend)


def build(shape: ReconstructionShape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)
    side, bands, batch = shape.image_size, shape.bands, shape.batch
    count = (side // shape.patch) ** 2
    loss: Callable[..., Tensor] = scalemae
    first, second = (batch, bands, 2 * side, 2 * side), (batch, bands, side, side)
    if shape.family == "satmae++":
        loss = partial(satmaepp, patch=shape.patch)
        first, second = (batch, count, shape.patch**2 * bands), first  # type: ignore[assignment]

    def input_set() -> Tensors:
        predictions = [draw.normal(*size, scale=0.3, offset=0.5) for size in (first, second)]
        for prediction in predictions:
            prediction.requires_grad_(mode != FORWARD)
        images = draw.normal(batch, bands, side, side, scale=0.3, offset=0.5)
        mask = (draw.uniform(batch, count).argsort(dim=1) < MASKED_SHARE * count).to(images.dtype)
        return (*predictions, images, mask)

    # Predictions and images in; backward, once more, and the predictions' gradients out.
    predicted = torch.Size(first).numel() + torch.Size(second).numel()
    elements = predicted + batch * bands * side**2
    if mode != FORWARD:
        elements = 2 * elements + predicted
    return Case(
        functions={"fused": loss, "eager": partial(loss, backend="eager")},
        inputs=rotating(setting, input_set),
        floor=lambda: floors.floor_of([], elements, setting),
    )


def test_reconstruction(report: Callable[..., None]) -> None:
    report(build)
