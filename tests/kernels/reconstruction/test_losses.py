"""The losses of masked reconstruction: against loops over pixels and patches, and their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._operator import Operator
from spectralx_kernels.reconstruction import (
    band_reconstruction_loss,
    band_targets,
    masked_patch_loss,
    patchify,
    upsampled_l1_loss,
)
from spectralx_kernels.reconstruction.ops import (
    BAND_RECONSTRUCTION_LOSS,
    MASKED_PATCH_LOSS,
    UPSAMPLED_L1_LOSS,
)
from tests.kernels import ladder
from tests.tolerances import ROUND_OFF


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def bits(*shape: int, seed: int = 0) -> Tensor:
    """Zeros and ones, at least one of them 1."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, shape, generator=generator).double()
    mask.view(-1)[:1] = 1
    return mask


CASES: dict[str, tuple[Operator, tuple[Any, ...]]] = {
    "patch": (MASKED_PATCH_LOSS, (draw(2, 2, 8), draw(2, 2, 2, 4, seed=1), bits(2, 2), 2, False)),
    "normalized": (
        MASKED_PATCH_LOSS,
        (draw(1, 6, 4), draw(1, 1, 4, 6, seed=1), bits(1, 6), 2, True),
    ),
    "l1": (UPSAMPLED_L1_LOSS, (draw(2, 2, 5, 3), draw(2, 2, 3, 2, seed=1))),
    "band": (
        BAND_RECONSTRUCTION_LOSS,
        (
            draw(2, 2, 4, 8),
            draw(2, 2, 2, 4, seed=1),
            draw(2, 2, 2, 4, seed=2),
            bits(2, 2),
            [1, 2],
            [2, 1],
        ),
    ),
    "l1, channels last": (
        UPSAMPLED_L1_LOSS,
        (draw(2, 3, 7, 9).to(memory_format=torch.channels_last), draw(2, 3, 4, 4, seed=1)),
    ),
    "l1, smaller and the same": (UPSAMPLED_L1_LOSS, (draw(1, 2, 2, 5), draw(1, 2, 7, 5, seed=1))),
    "band, channels last, sizes that do not divide": (
        BAND_RECONSTRUCTION_LOSS,
        (
            draw(2, 3, 6, 8).to(memory_format=torch.channels_last),
            draw(2, 3, 3, 4, seed=1).to(memory_format=torch.channels_last),
            draw(2, 3, 4, 7, seed=2),
            torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0.5, 1, 0, 1]]),
            [3, 2],
            [2, 3],
        ),
    ),
}
# Sizes at which kernels go through more than one tile, row of cells and vector.
LARGE: dict[str, tuple[Operator, tuple[Any, ...]]] = {
    "normalized": (
        MASKED_PATCH_LOSS,
        (draw(2, 6, 16 * 16 * 13), draw(2, 13, 32, 48, seed=1), bits(2, 6), 16, True),
    ),
    "l1": (UPSAMPLED_L1_LOSS, (draw(2, 5, 70, 150), draw(2, 5, 35, 75, seed=1))),
    "band": (
        BAND_RECONSTRUCTION_LOSS,
        (
            draw(2, 5, 64, 96),
            draw(2, 5, 32, 48, seed=1).to(memory_format=torch.channels_last),
            draw(2, 5, 32, 48, seed=2),
            bits(2, 6),
            [2, 3],
            [2, 3],
        ),
    ),
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_beyond_one_tile(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "triton" in _backends.available(LARGE[case][0].name, "cpu"):
        monkeypatch.setattr("spectralx_kernels.reconstruction.triton._BLOCK", 1024)
    ladder.check_accuracy(*LARGE[case], dtype)


@pytest.mark.parametrize("case", LARGE)
def test_any_number_of_threads_gives_the_same_bits(case: str) -> None:
    operator, args = LARGE[case]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(
                ladder.run_with_gradients(operator.op, ladder.cast(args, torch.float32, grad=True))
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0][0], results[1][0][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_gradients_lie_as_their_predictions(backend: str) -> None:
    images, mask = draw(2, 3, 4, 4).float(), torch.ones(2, 4)
    for last in (False, True):
        layout = torch.channels_last if last else torch.contiguous_format
        high, low = (
            draw(2, 3, side, side).float().contiguous(memory_format=layout).requires_grad_()
            for side in (8, 4)
        )
        loss = band_reconstruction_loss(high, low, images, mask, backend=backend)
        loss = loss + upsampled_l1_loss(high, images, backend=backend)
        for leaf, grad in zip((high, low), torch.autograd.grad(loss, (high, low)), strict=True):
            assert grad.stride() == leaf.stride()


@pytest.mark.parametrize("case", CASES)
def test_ladder(case: str) -> None:
    operator, args = CASES[case]
    ladder.check_contract(operator, args)
    ladder.check_gradients(operator, args)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ladder.check_accuracy(operator, args, dtype)
    ladder.check_repeats(operator, args)


def test_compiles() -> None:
    def run(patches: Tensor, large: Tensor, small: Tensor, images: Tensor) -> Tensor:
        mse = masked_patch_loss(patches, images, mask, 2)
        l1 = upsampled_l1_loss(large, images)
        return 0.6 * mse + 0.4 * l1 + band_reconstruction_loss(large, small, images, mask)

    mask = bits(2, 4).float()
    args = (draw(2, 4, 8), draw(2, 2, 8, 8), draw(2, 2, 4, 4, seed=2), draw(2, 2, 4, 4, seed=1))
    ladder.check_compiles(run, args, compiler="aot_eager")


@given(
    bands=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    patch=st.integers(1, 3),
    normalize=st.booleans(),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_patch_loss_is_the_mean_over_masked_patches(
    bands: int, grid: tuple[int, int], patch: int, normalize: bool
) -> None:
    images = draw(2, bands, grid[0] * patch, grid[1] * patch)
    patches = grid[0] * grid[1]
    prediction, mask = draw(2, patches, patch * patch * bands, seed=1), bits(2, patches)
    errors = []
    for row, cell in mask.nonzero().tolist():
        target = patchify(images, patch)[row, cell]
        if normalize:
            variance = target.var() if len(target) > 1 else torch.zeros(())
            target = (target - target.mean()) / (variance + 1e-6).sqrt()
        errors.append(F.mse_loss(prediction[row, cell], target))
    loss = masked_patch_loss(prediction, images, mask, patch, normalize=normalize)
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_constant_patches_normalize_to_zero(backend: str) -> None:
    images = torch.full((1, 2, 4, 4), 0.5)
    loss = masked_patch_loss(
        torch.zeros(1, 4, 8), images, torch.ones(1, 4), 2, normalize=True, backend=backend
    )
    assert loss == 0


@given(
    channels=st.integers(1, 3),
    small=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    large=st.tuples(st.integers(1, 11), st.integers(1, 11)),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_l1_of_any_size(channels: int, small: tuple[int, int], large: tuple[int, int]) -> None:
    images, prediction = draw(2, channels, *small), draw(2, channels, *large, seed=1)
    target = F.interpolate(images, size=large, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsampled_l1_loss(prediction, images), F.l1_loss(prediction, target))


def test_high_target_has_no_mean_and_low_target_keeps_it() -> None:
    """Sizes of the published model at a quarter: 56 images, 112 and 56 predictions."""
    images = draw(2, 3, 56, 56)
    high, low = band_targets(images, (112, 112), (56, 56), (14, 14))
    torch.testing.assert_close(low, images)  # twice as large, then averaged: the image itself
    base = F.interpolate(F.avg_pool2d(images, 4), size=112, mode="bilinear", align_corners=False)
    torch.testing.assert_close(high + base, images.repeat_interleave(2, 2).repeat_interleave(2, 3))
    flat, same = band_targets(torch.ones(1, 1, 4, 4), (8, 8), (2, 2), (2, 2))
    assert torch.equal(flat, torch.zeros(1, 1, 8, 8))
    assert torch.equal(same, torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(("grid", "given"), [((2, 2), None), ((1, 3), (1, 3))])
def test_band_loss_counts_masked_pixels_not_bands(
    grid: tuple[int, int], given: tuple[int, int] | None
) -> None:
    cell = 4
    images = draw(2, 3, grid[0] * cell, grid[1] * cell)
    high = draw(2, 3, grid[0] * 2 * cell, grid[1] * 2 * cell, seed=1)
    low = draw(2, 3, grid[0] * cell, grid[1] * cell, seed=2)
    mask = bits(2, grid[0] * grid[1], seed=4)
    high_target, low_target = band_targets(images, high.shape[2:], low.shape[2:], grid)
    expected = torch.zeros((), dtype=torch.float64)
    for prediction, target, side in ((high, high_target, 2 * cell), (low, low_target, cell)):
        total, pixels = 0.0, 0
        for row, patch in mask.nonzero().tolist():
            top, left = (side * place for place in divmod(patch, grid[1]))
            block = (row, slice(None), slice(top, top + side), slice(left, left + side))
            total += float((prediction[block] - target[block]).square().sum())
            pixels += side * side
        expected += total / pixels
    loss = band_reconstruction_loss(high, low, images, mask, grid=given)
    torch.testing.assert_close(loss, expected)


def test_base_size_defaults_to_the_grid() -> None:
    images, mask = draw(1, 2, 8, 8), bits(1, 4)
    high, low = draw(1, 2, 16, 16, seed=1), draw(1, 2, 8, 8, seed=2)
    losses = [
        band_reconstruction_loss(high, low, images, mask, base_size=base)
        for base in (None, (2, 2), (4, 4))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def all_losses(scale: float, mask: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every loss and the gradient of its prediction, from draws of magnitude `scale`."""
    batch = mask.shape[0]
    images = (scale * draw(batch, 2, 4, 4)).to(dtype)
    leaves = [
        (scale * draw(batch, *shape, seed=1)).to(dtype).requires_grad_()
        for shape in ((4, 8), (2, 8, 8), (2, 4, 4))
    ]
    losses = {
        "patch": masked_patch_loss(leaves[0], images, mask, 2),
        "normalized": masked_patch_loss(leaves[0], images, mask, 2, normalize=True),
        "band": band_reconstruction_loss(leaves[1], leaves[2], images, mask),
        "l1": upsampled_l1_loss(leaves[1], images),
    }
    grads = {
        f"gradient of {name}": torch.autograd.grad(loss, leaf)[0]
        for (name, loss), leaf in zip(
            losses.items(), (leaves[0], leaves[0], leaves[1], leaves[1]), strict=True
        )
    }
    return losses | grads


def test_nothing_masked_is_zero_with_zero_gradient() -> None:
    for name, value in all_losses(1.0, torch.zeros(2, 4), torch.float32).items():
        if "l1" not in name:
            assert torch.equal(value, torch.zeros_like(value)), name


def test_empty_batch_is_zero() -> None:
    for name, value in all_losses(1.0, torch.zeros(0, 4), torch.float32).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_of_1e4_stay_finite(dtype: torch.dtype) -> None:
    for name, value in all_losses(1e4, bits(2, 4), dtype).items():
        assert value.dtype == dtype, name
        assert value.isfinite().all(), name


def test_nan_stays_nan_where_it_counts() -> None:
    images, mask = draw(1, 2, 4, 4), torch.ones(1, 4)
    images[0, 1, 2, 2] = torch.nan
    assert masked_patch_loss(draw(1, 4, 8), images, mask, 2).isnan()
    assert upsampled_l1_loss(draw(1, 2, 8, 8), images).isnan()
    assert band_reconstruction_loss(draw(1, 2, 8, 8), draw(1, 2, 4, 4), images, mask).isnan()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    prediction, images, mask = draw(2, 4, 8), draw(2, 2, 4, 4, seed=1), bits(2, 4)
    expected = masked_patch_loss(prediction, images, mask, 2)
    assert torch.equal(masked_patch_loss(prediction, images, mask.to(dtype), 2), expected)
    high, low = draw(2, 2, 8, 8), draw(2, 2, 4, 4, seed=2)
    expected = band_reconstruction_loss(high, low, images, mask)
    assert torch.equal(band_reconstruction_loss(high, low, images, mask.to(dtype)), expected)


def test_autocast_computes_in_float32() -> None:
    prediction, images = draw(2, 4, 8).bfloat16().requires_grad_(), draw(2, 2, 4, 4).float()
    mask = bits(2, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_patch_loss(prediction, images, mask, 2)
    assert loss.dtype == torch.float32
    expected = masked_patch_loss(prediction.double(), images.double(), mask.double(), 2)
    assert abs(loss.item() - expected.item()) <= ROUND_OFF[torch.float32] * expected.item()
    loss.backward()
    assert prediction.grad is not None
    assert prediction.grad.dtype == torch.bfloat16


def test_non_contiguous_input() -> None:
    images, mask = draw(2, 2, 4, 4), bits(4, 2).t()
    large = draw(2, 2, 8, 8)
    strided = images.to(memory_format=torch.channels_last)
    for found, expected in (
        (upsampled_l1_loss(large, strided), upsampled_l1_loss(large, images)),
        (
            band_reconstruction_loss(large, strided, strided, mask),
            band_reconstruction_loss(large, images, images, mask.contiguous()),
        ),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(2, 4, 8).long()}, r"prediction: got dtype torch\.int64"),
        ({"prediction": torch.zeros(2, 4, 7)}, r"prediction: got shape \[2, 4, 7\], expected \[2"),
        ({"images": torch.zeros(2, 2, 4, 4).int()}, r"images: got dtype torch\.int32"),
        ({"images": torch.zeros(2, 4, 4)}, r"images: got shape \[2, 4, 4\]"),
        ({"images": torch.zeros(2, 2, 4, 4, device="meta")}, "images: got device meta"),
        ({"mask": torch.zeros(2, 5)}, r"mask: got shape \[2, 5\], expected \[2, 4\]"),
        ({"mask": torch.zeros(2, 4, dtype=torch.complex64)}, r"mask: got dtype torch\.complex64"),
        ({"mask": torch.zeros(2, 4, device="meta")}, "mask: got device meta"),
        ({"patch": 3}, "patch: got 3, expected a divisor of the height 4 and width 4"),
    ],
)
def test_bad_arguments_of_the_patch_loss(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"prediction": torch.zeros(2, 4, 8), "images": torch.zeros(2, 2, 4, 4)}
    good |= {"mask": torch.ones(2, 4), "patch": 2}
    with pytest.raises((TypeError, ValueError), match=message):
        masked_patch_loss(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"high": torch.zeros(2, 3, 8, 8)}, r"high: got shape \[2, 3, 8, 8\], expected \[2, 2"),
        ({"low": torch.zeros(2, 2, 5, 4)}, r"low: got size \[5, 4\], expected multiples of the 2"),
        ({"low": torch.zeros(2, 2, 4, 4).int()}, r"low: got dtype torch\.int32"),
        ({"images": torch.zeros(2, 4, 4)}, r"images: got shape \[2, 4, 4\]"),
        ({"mask": torch.ones(2, 3)}, "mask: got 3 patches, expected a square number"),
        ({"mask": torch.ones(1, 4)}, r"mask: got shape \[1, 4\], expected \[2, patches\]"),
        ({"grid": (1, 3)}, r"grid: got \[1, 3\], expected two sizes of product 4"),
        ({"base_size": (0, 2)}, r"base_size: got \[0, 2\], expected two sizes of at least 1"),
    ],
)
def test_bad_arguments_of_the_band_loss(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"high": torch.zeros(2, 2, 8, 8), "low": torch.zeros(2, 2, 4, 4)}
    good |= {"images": torch.zeros(2, 2, 4, 4), "mask": torch.ones(2, 4)}
    with pytest.raises((TypeError, ValueError), match=message):
        band_reconstruction_loss(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(2, 3, 8, 8)}, r"prediction: got shape \[2, 3, 8, 8\]"),
        ({"prediction": torch.zeros(2, 2, 0, 8)}, "prediction: got shape .* at least 1"),
        ({"images": torch.zeros(2, 2, 4, 4).bool()}, r"images: got dtype torch\.bool"),
    ],
)
def test_bad_arguments_of_the_l1_loss(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "prediction": torch.zeros(2, 2, 8, 8),
        "images": torch.zeros(2, 2, 4, 4),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        upsampled_l1_loss(**{**good, **change})


def test_bad_sizes_of_the_targets() -> None:
    with pytest.raises(ValueError, match=r"low_size: got \[0, 4\], expected two sizes"):
        band_targets(torch.zeros(1, 1, 4, 4), (8, 8), (0, 4), (2, 2))
