"""patchify and unpatchify: the order inside a patch, the way back, bad sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralx_kernels.reconstruction import patchify, unpatchify


@given(
    batch=st.integers(0, 2),
    bands=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    patch=st.integers(1, 5),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_patch_runs_row_column_band(
    batch: int, bands: int, grid: tuple[int, int], patch: int
) -> None:
    height, width = grid[0] * patch, grid[1] * patch
    images = torch.arange(batch * bands * height * width).view(batch, bands, height, width)
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid[0] * grid[1], patch * patch * bands)
    for cell in range(patches.shape[1] if batch else 0):
        row, column = divmod(cell, grid[1])
        block = images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        assert torch.equal(patches[:, cell], block.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, patch, (height, width)), images)
    if grid[0] == grid[1]:
        assert torch.equal(unpatchify(patches, patch), images)


def test_gradients_go_back_to_their_pixels() -> None:
    images = torch.randn(1, 2, 4, 6, requires_grad=True)
    upstream = torch.randn(1, 6, 8)
    (grad,) = torch.autograd.grad(patchify(images, 2), images, upstream)
    assert torch.equal(grad, unpatchify(upstream, 2, (4, 6)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(torch.zeros(2, 3, 5), 2), r"images: got shape \[2, 3, 5\]"),
        (lambda: patchify(torch.zeros(2, 3, 0, 4), 2), "images: got shape .* at least 1"),
        (
            lambda: patchify(torch.zeros(2, 3, 4, 6), 4),
            "patch: got 4, expected a divisor of the height 4 and width 6 of images",
        ),
        (lambda: patchify(torch.zeros(2, 3, 4, 6), 0), "patch: got 0, expected a divisor"),
        (
            lambda: unpatchify(torch.zeros(2, 6, 12), 2),
            "patches: got 6 patches, expected a square number",
        ),
        (
            lambda: unpatchify(torch.zeros(2, 6, 12), 2, (4, 4)),
            r"size: got \[4, 4\], expected multiples of 2 that hold 6 patches",
        ),
        (
            lambda: unpatchify(torch.zeros(2, 4, 6), 2),
            "patches: got vectors of 6, expected a multiple of patch",
        ),
        (lambda: unpatchify(torch.zeros(4, 6), 2), r"patches: got shape \[4, 6\]"),
        (lambda: unpatchify(torch.zeros(2, 4, 12), 0), "patch: got 0, expected 1 to"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()
