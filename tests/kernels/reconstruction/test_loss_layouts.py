"""The losses on the CPU in both layouts: wide rows, large gradients, what is not masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._operator import Operator
from spectralx_kernels.reconstruction import (
    band_reconstruction_loss,
    masked_patch_loss,
    upsampled_l1_loss,
)
from spectralx_kernels.reconstruction.ops import BAND_RECONSTRUCTION_LOSS, UPSAMPLED_L1_LOSS
from tests.kernels import ladder
from tests.kernels.reconstruction.test_losses import bits, draw

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Rows of more than one tile of 1024 values, cells that are cut, several cells in a tile.
WIDE: dict[str, tuple[Operator, tuple[Any, ...]]] = {
    "l1 doubled": (UPSAMPLED_L1_LOSS, (draw(1, 13, 6, 166), draw(1, 13, 3, 83, seed=1))),
    "l1 of one band": (UPSAMPLED_L1_LOSS, (draw(2, 1, 3, 2500), draw(2, 1, 2, 1250, seed=1))),
    "l1 of any factor": (UPSAMPLED_L1_LOSS, (draw(1, 13, 7, 150), draw(1, 13, 3, 40, seed=1))),
    "band": (
        BAND_RECONSTRUCTION_LOSS,
        (
            draw(1, 13, 8, 192),
            draw(1, 13, 4, 96, seed=1),
            draw(1, 13, 4, 96, seed=2),
            bits(1, 12, seed=3),
            [2, 6],
            [2, 6],
        ),
    ),
}


def laid_out(operator: Operator, args: tuple[Any, ...], layout: torch.memory_format) -> list[Any]:
    """`args` with the predictions in `layout`."""
    predictions = 2 if operator is BAND_RECONSTRUCTION_LOSS else 1
    return [
        arg.contiguous(memory_format=layout) if place < predictions else arg
        for place, arg in enumerate(args)
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", WIDE)
def test_wide_rows(case: str, layout: torch.memory_format) -> None:
    operator, args = WIDE[case]
    for dtype in (torch.float32, torch.bfloat16):
        ladder.check_accuracy(operator, laid_out(operator, args, layout), dtype)


def gradients(leaves: list[Tensor], loss: Any) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(loss(*leaves), leaves))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gradients_are_those_of_their_halves(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """A gradient of 16 MiB and more goes another way to memory; of the two halves none does."""
    height, width = (1002, 750) if dtype == torch.float32 else (1402, 1050)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    large = normal(2, 3, height, width).contiguous(memory_format=layout)
    images, small = normal(2, 3, height // 2, width // 2), normal(2, 3, 4, 6)
    assert large.nbytes >= 16 * 2**20 > large.nbytes // 2
    mask = bits(1, 6).to(dtype)
    for whole, half in (
        (
            gradients([large], lambda x: upsampled_l1_loss(x, images)),
            lambda part: gradients([large[part]], lambda x: upsampled_l1_loss(x, images[part])),
        ),
        (
            gradients(
                [large, small],
                lambda x, y: band_reconstruction_loss(x, y, images, mask.expand(2, 6), grid=(2, 3)),
            ),
            lambda part: gradients(
                [large[part], small[part]],
                lambda x, y: band_reconstruction_loss(x, y, images[part], mask, grid=(2, 3)),
            ),
        ),
    ):
        for part in (slice(0, 1), slice(1, 2)):
            for found, expected in zip(whole, half(part), strict=True):
                assert found.any()
                # Twice as many values to be the mean of: half the gradient, exactly.
                assert torch.equal(found[part] * 2, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_not_masked_is_not_read(layout: torch.memory_format) -> None:
    if "cpp" not in _backends.available(BAND_RECONSTRUCTION_LOSS.name, "cpu"):
        pytest.skip("the C++ kernels are not built here")
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0]])
    unmasked = mask.view(2, 3) == 0

    def hidden(cell: int) -> Tensor:
        """Predictions of cells of this side, NaN where they are not masked."""
        values = draw(1, 5, 2 * cell, 3 * cell).float()
        holes = unmasked.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        return values.masked_fill(holes, torch.nan).contiguous(memory_format=layout)

    patches, images = draw(1, 6, 4 * 4 * 5).float(), draw(1, 5, 8, 12, seed=1).float()
    patches[mask == 0] = torch.nan
    for leaves, loss in (
        ([patches], lambda x: masked_patch_loss(x, images, mask, 4, backend="cpp")),
        (
            [hidden(8), hidden(4)],
            lambda x, y: band_reconstruction_loss(x, y, images, mask, grid=(2, 3), backend="cpp"),
        ),
    ):
        assert loss(*leaves).isfinite()
        for leaf, grad in zip(leaves, gradients(leaves, loss), strict=True):
            assert torch.equal(grad == 0, leaf.isnan())
