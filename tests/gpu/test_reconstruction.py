"""Masked reconstruction on a GPU: the proof ladder, order of noise, graphs, no synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralx_kernels import (
    band_reconstruction_loss,
    gather_tokens,
    masked_patch_loss,
    random_masking,
    restore_tokens,
    upsampled_l1_loss,
    use_backend,
)
from spectralx_kernels.reconstruction.masking import RANDOM_MASKING
from spectralx_kernels.reconstruction.ops import MASKED_PATCH_LOSS
from tests.gpu.watching import kernels, no_synchronisation
from tests.kernels import ladder
from tests.kernels.reconstruction.test_losses import CASES, LARGE, bits, draw
from tests.kernels.reconstruction.test_masking import MOVES

OPERATOR = MASKED_PATCH_LOSS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Launches of CUDA C++, forward and backward: what a small batch waits for.
LAUNCHES = {"masking": 1, "gather": 2, "restore": 3, "patch": 4, "l1": 3, "band": 5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, *(f"large {name}" for name in LARGE)])
def test_losses(case: str, dtype: torch.dtype) -> None:
    operator, args = CASES[case] if case in CASES else LARGE[case.removeprefix("large ")]
    ladder.check_accuracy(operator, args, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MOVES)
def test_moves(case: str, dtype: torch.dtype) -> None:
    operator, args = MOVES[case]
    ladder.check_accuracy(operator, args, dtype, "cuda")


def differentiated(
    run: Callable[[], Tensor], wanted: list[Tensor], upstream: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(), wanted, upstream)


def test_launches(backend: str) -> None:
    if backend != "cuda":
        pytest.skip("counted for CUDA C++")
    leaves = inputs(torch.float32, last=False)
    images, noise = draw(2, 5, 48, 48).float().cuda(), torch.rand(2, 9, device="cuda")
    ids_keep, mask, ids_restore = random_masking(noise, 2, backend=backend)
    visible = draw(2, 2, 70).float().cuda().requires_grad_()
    patches, high, low = leaves["patches"], leaves["high"], leaves["low"]
    results: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "gather": (lambda: gather_tokens(leaves["tokens"], ids_keep), [leaves["tokens"]]),
        "restore": (
            lambda: restore_tokens(visible, ids_restore, leaves["mask_token"]),
            [visible, leaves["mask_token"]],
        ),
        "patch": (lambda: masked_patch_loss(patches, images, mask, 16), [patches]),
        "l1": (lambda: upsampled_l1_loss(high, images), [high]),
        "band": (lambda: band_reconstruction_loss(high, low, images, mask), [high, low]),
    }
    found = {"masking": kernels(lambda: RANDOM_MASKING(noise, 2, backend=backend))}
    for name, (run, wanted) in results.items():
        with use_backend(backend):
            upstream = torch.ones_like(run())
            found[name] = kernels(partial(differentiated, run, wanted, upstream))
    assert {name: len(names) for name, names in found.items()} == LAUNCHES, found


@pytest.mark.parametrize(
    "kind", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64]
)
def test_masks_of_any_type(kind: torch.dtype, backend: str) -> None:
    leaves = inputs(torch.float32, last=False)
    images, mask = draw(2, 5, 48, 48).float().cuda(), bits(2, 9).float().cuda()
    results = [
        masked_patch_loss(leaves["patches"], images, given, 16, backend=backend)
        for given in (mask, mask.to(kind))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("tokens", [1, 15, 196, 1000])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_masking_is_a_stable_sort(tokens: int, levels: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    noise = (torch.randint(0, levels, (3, tokens), generator=generator) / levels).cuda()
    noise[0, -1] = torch.nan
    keep = tokens // 4
    order = noise.argsort(dim=1, stable=True)
    ids_keep, mask, ids_restore = random_masking(noise, keep, backend=backend)
    assert torch.equal(ids_keep, order[:, :keep])
    assert torch.equal(ids_restore.gather(1, order), torch.arange(tokens).expand(3, -1).cuda())
    assert torch.equal(mask, (ids_restore >= keep).to(noise.dtype))


def inputs(dtype: torch.dtype, *, last: bool) -> dict[str, Tensor]:
    """Predictions that require a gradient, images and tokens, on the GPU."""
    layout = torch.channels_last if last else torch.contiguous_format
    made = {
        "patches": draw(2, 9, 16 * 16 * 5, seed=1),
        "high": draw(2, 5, 96, 96, seed=2).contiguous(memory_format=layout),
        "low": draw(2, 5, 48, 48, seed=3).contiguous(memory_format=layout),
        "tokens": draw(2, 9, 70, seed=4),
        "mask_token": draw(70, seed=5),
    }
    return {name: value.to("cuda", dtype).requires_grad_() for name, value in made.items()}


def step(leaves: dict[str, Tensor], images: Tensor, noise: Tensor, backend: str) -> list[Tensor]:
    """Masking, moves, every loss, and gradients."""
    ids_keep, mask, ids_restore = random_masking(noise, 2, backend=backend)
    visible = gather_tokens(leaves["tokens"], ids_keep, backend=backend)
    restored = restore_tokens(visible, ids_restore, leaves["mask_token"], backend=backend)
    losses = [
        masked_patch_loss(
            leaves["patches"], images, mask, 16, normalize=normalize, backend=backend
        ).float()
        for normalize in (False, True)
    ]
    losses += [
        upsampled_l1_loss(leaves["high"], images, backend=backend).float(),
        band_reconstruction_loss(
            leaves["high"], leaves["low"], images, mask, backend=backend
        ).float(),
        restored.float().square().mean(),
    ]
    total = torch.stack(losses).sum()
    return [total, mask, ids_restore, *torch.autograd.grad(total, list(leaves.values()))]


@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_without_synchronisation(dtype: torch.dtype, last: bool, backend: str) -> None:
    leaves = inputs(dtype, last=last)
    images, noise = draw(2, 5, 48, 48).to("cuda", dtype), torch.rand(2, 9, device="cuda")

    def run() -> list[Tensor]:
        return step(leaves, images, noise, backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    with no_synchronisation():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(2):
        noise.copy_(draw(2, 9, seed=seed))
        graph.replay()
        for found, expected in zip(captured, run(), strict=True):
            torch.testing.assert_close(found, expected)


def test_same_inputs_same_bits(backend: str) -> None:
    if backend == "eager":
        pytest.skip("the reference's gradients are torch's, which may add atomically")
    leaves = inputs(torch.float32, last=False)
    images, noise = draw(2, 5, 48, 48).float().cuda(), torch.rand(2, 9, device="cuda")
    runs = [step(leaves, images, noise, backend) for _ in range(2)]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "loss",
    [
        lambda large, images, mask, **b: masked_patch_loss(large, images, mask, 16, **b),
        lambda large, images, mask, **b: upsampled_l1_loss(large, images, **b),
        lambda large, images, mask, **b: band_reconstruction_loss(large, images, images, mask, **b),
    ],
    ids=["patch", "l1", "band"],
)
def test_nothing_of_the_target_is_kept(loss: Callable[..., Any], backend: str) -> None:
    """Beyond the gradient a loss takes less than a fiftieth of the prediction's memory."""
    if backend == "eager":
        pytest.skip("the reference forms targets")
    patches = loss.__code__.co_names[0] == "masked_patch_loss"
    shape = (4, 196, 16 * 16 * 13) if patches else (4, 13, 448, 448)
    large = draw(*shape).float().cuda().requires_grad_()
    images, mask = draw(4, 13, 224, 224).float().cuda(), bits(4, 196).float().cuda()
    loss(large, images, mask, backend=backend).backward()
    large.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (grad,) = torch.autograd.grad(loss(large, images, mask, backend=backend), [large])
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - grad.nbytes
    assert extra < large.nbytes / 50
