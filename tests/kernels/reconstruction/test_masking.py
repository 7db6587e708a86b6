"""random_masking and the moving of tokens: order, ties, permutations, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels._operator import Operator
from spectralx_kernels.reconstruction import gather_tokens, random_masking, restore_tokens
from spectralx_kernels.reconstruction.masking import (
    GATHER_TOKENS,
    RANDOM_MASKING,
    RESTORE_TOKENS,
)
from tests.kernels import ladder


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_ladder() -> None:
    args = (draw(3, 9), 4)
    ladder.check_contract(RANDOM_MASKING, args)
    for dtype in (torch.float64, torch.float32):
        ladder.check_accuracy(RANDOM_MASKING, args, dtype)
    ladder.check_repeats(RANDOM_MASKING, args)


def indices(batch: int, count: int, limit: int) -> Tensor:
    generator = torch.Generator().manual_seed(limit)
    return torch.randint(0, limit, (batch, count), generator=generator)


MOVES: dict[str, tuple[Operator, tuple[Any, ...]]] = {
    "gather": (GATHER_TOKENS, (draw(2, 6, 5), indices(2, 4, 6))),
    "gather twice": (GATHER_TOKENS, (draw(3, 2, 3), indices(3, 7, 2))),
    "gather none": (GATHER_TOKENS, (draw(2, 3, 2), indices(2, 0, 3))),
    "restore": (
        RESTORE_TOKENS,
        (draw(3, 2, 5), torch.stack([torch.randperm(6) for _ in range(3)]), draw(5, seed=1)),
    ),
    "restore nothing": (RESTORE_TOKENS, (draw(2, 0, 3), indices(2, 4, 4), draw(1, 1, 3, seed=1))),
    "no images": (RESTORE_TOKENS, (draw(0, 2, 3), indices(0, 4, 4), draw(3, seed=1))),
}


@pytest.mark.parametrize("case", MOVES)
def test_ladder_of_moves(case: str) -> None:
    operator, args = MOVES[case]
    ladder.check_contract(operator, args)
    ladder.check_gradients(operator, args)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        ladder.check_accuracy(operator, args, dtype)
    ladder.check_repeats(operator, args)


def test_moves_are_not_rounded_under_autocast(backend: str) -> None:
    tokens, mask_token = draw(2, 6, 5).float(), draw(5, seed=1).float()
    ids_keep, _, ids_restore = random_masking(draw(2, 6, seed=2), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        visible = gather_tokens(tokens, ids_keep, backend=backend)
        restored = restore_tokens(visible, ids_restore, mask_token, backend=backend)
    assert restored.dtype == torch.float32
    assert torch.equal(restored.gather(1, ids_keep[..., None].expand(-1, -1, 5)), visible)


def test_compiles_with_what_a_masked_autoencoder_does() -> None:
    def run(tokens: Tensor, noise: Tensor, mask_token: Tensor) -> tuple[Tensor, Tensor]:
        ids_keep, mask, ids_restore = random_masking(noise, 3)
        visible = gather_tokens(tokens, ids_keep).square()
        return restore_tokens(visible, ids_restore, mask_token), mask.detach()

    def run_on(tokens: Tensor, mask_token: Tensor) -> tuple[Tensor, Tensor]:
        return run(tokens, noise, mask_token)

    noise = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    ladder.check_compiles(run_on, (draw(2, 8, 5), draw(1, 1, 5)), compiler="aot_eager")


@given(
    batch=st.integers(0, 3),
    tokens=st.sampled_from([1, 2, 9, 31, 196, 600]),
    levels=st.sampled_from([1, 3, 10**6]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_keeps_the_smallest_in_order(
    batch: int, tokens: int, levels: int, data: st.DataObject
) -> None:
    """Against Python's stable sort; few levels make ties."""
    keep = data.draw(st.integers(0, tokens))
    generator = torch.Generator().manual_seed(tokens)
    noise = torch.randint(0, levels, (batch, tokens), generator=generator) / levels
    ids_keep, mask, ids_restore = random_masking(noise, keep)
    assert ids_keep.shape == (batch, keep)
    assert mask.dtype == noise.dtype
    for row in range(batch):
        order = sorted(range(tokens), key=noise[row].tolist().__getitem__)
        assert ids_keep[row].tolist() == order[:keep]
        assert [order[rank] for rank in ids_restore[row].tolist()] == list(range(tokens))
        assert mask[row].nonzero().flatten().tolist() == sorted(order[keep:])


def test_order_of_zeros_infinities_and_extremes(backend: str) -> None:
    noise = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, -3e38, torch.nan]])
    order, _, _ = random_masking(noise, 8, backend=backend)
    assert order.tolist() == [[3, 6, 5, 0, 1, 4, 2, 7]]


def test_nan_noise_sorts_last(backend: str) -> None:
    noise = torch.tensor([[torch.nan, 0.5, torch.inf, 0.1]])
    ids_keep, mask, _ = random_masking(noise, 3, backend=backend)
    assert ids_keep.tolist() == [[3, 1, 2]]
    assert mask.tolist() == [[1, 0, 0, 0]]


def test_noise_is_not_rounded_under_autocast(backend: str) -> None:
    noise = torch.linspace(1.0, 0.9, 196).unsqueeze(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids_keep, mask, _ = random_masking(noise, 49, backend=backend)
    assert ids_keep[0].tolist() == list(range(195, 195 - 49, -1))
    assert mask.dtype == torch.float32


@pytest.mark.parametrize("mask_shape", [(5,), (1, 1, 5)])
def test_restore_puts_tokens_back(mask_shape: tuple[int, ...]) -> None:
    tokens, mask_token = draw(2, 7, 5), draw(*mask_shape, seed=1)
    ids_keep, mask, ids_restore = random_masking(draw(2, 7, seed=2), 3)
    restored = restore_tokens(gather_tokens(tokens, ids_keep), ids_restore, mask_token)
    expected = torch.where(mask.unsqueeze(-1) == 1, mask_token, tokens)
    assert torch.equal(restored, expected)


def test_gradients_of_gather_and_restore() -> None:
    ids_keep, _, ids_restore = random_masking(draw(2, 5), 2)
    tokens, mask_token = draw(2, 5, 3).requires_grad_(), draw(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: gather_tokens(t, ids_keep), (tokens,))
    visible = draw(2, 2, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, m: restore_tokens(t, ids_restore, m), (visible, mask_token)
    )


def test_everything_or_nothing_masked() -> None:
    tokens, mask_token = draw(2, 4, 3), draw(3)
    for keep in (0, 4):
        ids_keep, mask, ids_restore = random_masking(draw(2, 4, seed=1), keep)
        visible = gather_tokens(tokens, ids_keep)
        restored = restore_tokens(visible, ids_restore, mask_token)
        assert torch.equal(restored, tokens if keep else mask_token.expand(2, 4, 3))
        assert (mask == (keep == 0)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_masking(torch.zeros(2, 4).long(), 2), r"noise: got dtype torch\.int64"),
        (lambda: random_masking(torch.zeros(4), 2), r"noise: got shape \[4\], expected \[batch"),
        (lambda: random_masking(torch.zeros(2, 4), 5), "keep: got 5, expected 0 to 4"),
        (lambda: random_masking(torch.zeros(2, 4), -1), "keep: got -1, expected 0 to 4"),
        (
            lambda: gather_tokens(torch.zeros(2, 4, 3), torch.zeros(2, 2)),
            r"ids: got dtype torch\.float32, expected torch\.int64",
        ),
        (
            lambda: gather_tokens(torch.zeros(2, 4, 3), torch.zeros(1, 2).long()),
            r"ids: got shape \[1, 2\], expected \[2, kept\]",
        ),
        (
            lambda: gather_tokens(torch.zeros(2, 4), torch.zeros(2, 2).long()),
            r"tokens: got shape \[2, 4\]",
        ),
        (
            lambda: restore_tokens(torch.zeros(2, 5, 3), torch.zeros(2, 4).long(), torch.zeros(3)),
            "tokens: got 5 of them, expected at most the 4 of ids_restore",
        ),
        (
            lambda: restore_tokens(torch.zeros(2, 2, 3), torch.zeros(2, 4).long(), torch.zeros(4)),
            r"mask_token: got shape \[4\], expected \[3\]",
        ),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("index", [-1, 4])
def test_indices_outside_are_named(backend: str, index: int) -> None:
    tokens, ids = torch.zeros(2, 4, 3), torch.zeros(2, 4).long()
    ids[1, 2] = index
    with pytest.raises(IndexError, match=f"ids: got {index}, expected 0 to 3"):
        gather_tokens(tokens, ids, backend=backend)
    with pytest.raises(IndexError, match=f"ids_restore: got {index}, expected 0 to 3"):
        restore_tokens(tokens, ids, torch.zeros(3), backend=backend)
