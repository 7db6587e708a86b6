from __future__ import annotations

import pytest
import torch

from spectralx.data import (
    Compose,
    RandomCrop,
    RandomFlip,
    RandomQuarterTurn,
    RandomResizedCrop,
    Resize,
    Transform,
)

EVERY = [
    RandomFlip(),
    RandomQuarterTurn(),
    RandomCrop((5, 4)),
    RandomResizedCrop(6, scale=(0.3, 1.0)),
    Compose([RandomFlip(), RandomQuarterTurn(), RandomCrop(4)]),
]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pair(height: int = 8, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of distinct values, and an image that carries it in its first band."""
    mask = torch.arange(height * width).reshape(height, width)
    return torch.stack([mask.float(), -mask.float()]), mask


@pytest.mark.parametrize("transform", EVERY, ids=lambda transform: type(transform).__name__)
def test_randomness_is_the_generators(transform: Transform) -> None:
    image, mask = _pair()
    draws = [transform(image, mask, _generator(seed)) for seed in (0, 0, *range(1, 12))]
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert any(not torch.equal(draws[0][0], other) for other, _ in draws[2:])


@pytest.mark.parametrize("transform", [EVERY[0], EVERY[1], EVERY[2], EVERY[4]])
def test_image_and_mask_move_together(transform: Transform) -> None:
    image, mask = _pair()
    for seed in range(20):
        moved, moved_mask = transform(image, mask, _generator(seed))
        assert torch.equal(moved[0], moved_mask.float())
        assert torch.equal(moved[1], -moved_mask.float())
        assert moved_mask.dtype == torch.int64


def test_flips_and_turns_reach_all_eight_positions() -> None:
    image, mask = _pair(3, 3)
    transform = Compose([RandomFlip(), RandomQuarterTurn()])
    seen = {tuple(transform(image, mask, _generator(seed))[1].flatten().tolist())
            for seed in range(100)}  # fmt: skip
    assert len(seen) == 8


def test_crops_have_their_size_and_reach_the_borders() -> None:
    image, mask = _pair()
    corners = set()
    for seed in range(300):
        part, part_mask = RandomCrop((5, 4))(image, mask, _generator(seed))
        assert part.shape == (2, 5, 4)
        corners.add(int(part_mask[0, 0]))
    assert corners == {row * 7 + column for row in range(4) for column in range(4)}


def test_crops_larger_than_the_image_are_refused() -> None:
    image, mask = _pair()
    with pytest.raises(ValueError, match="image: found 8x7 pixels; expected 9x9 or more"):
        RandomCrop(9)(image, mask, _generator())


@pytest.mark.parametrize("size", [(3, 5), (16, 14), (8, 7), (20, 3)])
def test_resizing_keeps_labels_and_their_places(size: tuple[int, int]) -> None:
    image, mask = _pair()
    small, small_mask = Resize(size)(image, mask, _generator())
    assert small.shape == (2, *size)
    assert small_mask.shape == size
    assert set(small_mask.flatten().tolist()) <= set(mask.flatten().tolist())
    # Nearest neighbour and bilinear sample at the same centres: they differ by under a pixel.
    rows, columns = small_mask // 7, small_mask % 7
    for axis, (taken, length) in enumerate(((rows, 8), (columns, 7))):
        scale = length / size[axis]
        centres = (torch.arange(size[axis]) + 0.5) * scale - 0.5
        shape = (-1, 1) if axis == 0 else (1, -1)
        assert (taken - centres.reshape(shape)).abs().max() <= 0.5 + 1e-6


def test_masks_can_keep_their_size() -> None:
    image, mask = _pair()
    small, same = Resize(4, mask=False)(image, mask, _generator())
    assert small.shape == (2, 4, 4)
    assert torch.equal(same, mask)


def test_large_labels_survive_resizing() -> None:
    mask = torch.tensor([[2**40 + 1, 3]])
    _, resized = Resize((2, 4))(torch.zeros(1, 1, 2), mask, _generator())
    assert resized.tolist() == [[2**40 + 1, 2**40 + 1, 3, 3]] * 2


@pytest.mark.parametrize("size", [0, (4,), (3, -1)])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="size: found"):
        Resize(size)


def test_impossible_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="scale: found"):
        RandomResizedCrop(4, scale=(0.5, 1.5))
