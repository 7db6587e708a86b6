"""Seeded draws of sizes, options and tensors, and the layouts in memory they are given in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALL = (1, 2, 3, 4, 5, 7, 8, 9)
LARGE = (16, 17, 31, 33, 40)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
LAYOUTS = ("contiguous", "every second", "transposed", "offset", "channels last")


class Draw:
    """One sample's draws: the same seed draws the same.

    Parameters
    ----------
    seed : of sizes, options and values.
    large : one size in four is between 16 and 40 where the operator allows it.
    conditioned : norms are over 6 values or more. Those of one or two make gradients that are zero
        but for round-off, which a comparison of relative errors says nothing about.
    """

    def __init__(self, seed: int, *, large: bool = False, conditioned: bool = False) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.large = large
        self.conditioned = conditioned

    def size(self, low: int = 1, high: int = 9) -> int:
        """A size from `low` to `high`, or beyond where large ones are drawn; often 1 or odd."""
        if self.large and high >= 7 and self.random.random() < 0.25:
            return self.random.choice(LARGE)
        return self.random.choice([size for size in (0, *SMALL) if low <= size <= high])

    def batch(self) -> int:
        """0 in one of eight, else 1 to 3."""
        return 0 if self.random.random() < 0.125 else self.random.randint(1, 3)

    def norm_width(self, high: int = 9) -> int:
        """Values that a norm is over."""
        return self.size(7 if self.conditioned else 1, high)

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def choice(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """float64 of this mean and standard deviation."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return offset + scale * values

    def maybe(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor | None:
        """The same, or None."""
        return self.normal(*shape, scale=scale, offset=offset) if self.flag() else None

    def integers(self, high: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """0 to `high` - 1, in any integer dtype by default."""
        values = torch.randint(0, max(high, 1), shape, generator=self.generator)
        return values.to(self.choice(INTEGERS) if dtype is None else dtype)

    def layouts(self, args: Sequence[Any]) -> tuple[str, ...]:
        """A layout for each argument; half of the samples are contiguous all over."""
        if self.flag():
            return ("contiguous",) * len(args)
        return tuple(self.choice(LAYOUTS) for _ in args)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The values of `value` in memory as `layout` says, where its shape allows that."""
    if layout == "every second" and value.dim():
        spread = value.new_empty(*value.shape[:-1], 2 * value.shape[-1])
        spread[..., ::2] = value
        return spread[..., ::2]
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        room = value.new_empty(value.numel() + 3)
        room[3:] = value.flatten()
        return room[3:].view(value.shape)
    if layout == "channels last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value.contiguous()


def arrange(
    args: Sequence[Any],
    layouts: Sequence[str],
    dtype: torch.dtype,
    *,
    grad: bool = False,
    constants: Sequence[int] = (),
) -> list[Any]:
    """Copies of `args` in these layouts, floating point in `dtype`; leaves if `grad`, but for those
    at the places `constants`."""
    found: list[Any] = []
    for place, (value, layout) in enumerate(zip(args, layouts, strict=True)):
        if not isinstance(value, Tensor):
            found.append(value)
            continue
        wanted = value.detach().to(dtype) if value.is_floating_point() else value
        leaf = laid_out(wanted.clone(), layout).detach()
        found.append(
            leaf.requires_grad_(grad and leaf.is_floating_point() and place not in constants)
        )
    return found
