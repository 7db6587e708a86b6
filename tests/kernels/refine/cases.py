"""Sizes and arguments that the Are-adapter's kernels are tried with, on every device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.tolerances import ROUND_OFF

SCALE = 0.3  # of the scores
# batch, queries, keys, width: less than a tile, several with something left over, one of each
MATCHES = {
    "small": (2, 5, 7, 3),
    "several tiles": (2, 83, 150, 37),
    "several splits": (1, 20, 600, 8),
    "deep": (1, 17, 33, 130),
    "one vector over": (1, 49, 65, 16),
    "one query": (1, 1, 40, 8),
    "one key": (2, 70, 1, 24),
    "no keys": (2, 3, 0, 4),
    "no images": (0, 3, 5, 4),
    "no width": (1, 3, 5, 0),
}
# batch, tokens, width, keys
GATHERS: dict[str, tuple[int, int, int, int]] = {
    "small": (2, 5, 3, 7),
    "packs": (2, 19, 64, 33),
    "several tiles": (2, 37, 70, 45),
    "wide": (1, 5, 700, 9),
    "one of each": (1, 1, 3, 1),
    "no keys": (2, 3, 4, 0),
    "no images": (0, 3, 4, 5),
}
# batch, tokens, width
WEIGHTED = [(2, 19, 70), (3, 19, 64), (1, 1, 2), (0, 3, 4), (2, 0, 6), (1, 3, 2600)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gathering(batch: int, count: int, width: int, keys: int, mixed: int | None) -> list[Any]:
    """Arguments of `gather_norm` or, with `mixed`, `gather_norm_mix`: tokens are a strided half."""
    match = torch.randint(count, (batch, keys), generator=torch.Generator().manual_seed(keys))
    if keys > 3:
        match[:, 2:] = match[:, 2:].clamp(max=count // 2)  # tokens that no key takes
    mixing = [] if mixed is None else [draw(mixed, keys) / max(keys, 1) ** 0.5]
    norm = [1 + 0.1 * draw(width), 0.1 * draw(width, seed=1)]
    return [draw(batch, count, 2 * width)[..., :width], match, *norm, *mixing, 1e-5]


def weighing(batch: int, count: int, width: int) -> list[Any]:
    """Arguments of `add_weighted_halves`."""
    weights = draw(batch, count, seed=1), draw(batch, count, seed=2)
    return [draw(batch, count, width), *weights, draw(seed=3)]


def check_best(found: Tensor, queries: Tensor, keys: Tensor) -> None:
    """Each key's query is the best in float64, to round-off of the scores."""
    assert found.dtype == torch.int64
    assert found.shape == keys.shape[:2]
    if found.numel() == 0:
        return
    assert int(found.min()) >= 0
    assert int(found.max()) < queries.shape[1]
    scores = SCALE * queries.double() @ keys.double().mT
    value = scores - scores.logsumexp(dim=2, keepdim=True)
    gap = value.max(dim=1).values - value.gather(1, found[:, None])[:, 0]
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    assert float(gap.max()) <= 4 * ROUND_OFF[wide] * float(scores.abs().max().clamp_min(1.0))
