"""What both passes of AoMoA in Triton begin with: arguments, their sizes, folded weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import launch
from spectralx_kernels.aomoa import triton_products as products

UNPROVEN = _backends.UNPROVEN
MOST_EXPERTS = 256  # a tile's logits stay in registers
MOST_UNROLLED = 8  # experts whose code stands one after the other
MOST_WHOLE = 512  # of a rank that a program's registers hold
MOST_IN_REGISTERS = 64  # of a hidden layer, in backward
MOST_HIDDEN = 128  # of an expert's hidden layer then
# Tokens from which on tiles of 16 are more than a GPU runs at once.
MANY = 0 if INTERPRETED else 2048
FLAT = 1024  # elements of a program that takes a tensor as a flat one


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles: tokens, columns of the rank, columns of an expert's hidden layer
    and of all experts' side by side."""

    tokens: int
    columns: int
    hidden: int
    joint: int = 256
    warps: int = 4
    stages: int = 2


# The interpreter's time goes by operations, whatever their size.
SMALL = Tiles(64, 256, 64) if INTERPRETED else Tiles(32, 32, 32, joint=32, warps=8)


class Arguments(NamedTuple):
    """The operator's arguments, in its order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scaler: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    down: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    gate: Tensor
    gate_noise: Tensor
    noise: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    up: Tensor
    top_k: int
    norm_eps: float


_WEIGHTS = ("weight", "down", "gate", "fc1_weight", "fc2_weight", "up")


class Layer:
    """Contiguous arguments and their sizes."""

    def __init__(self, values: Sequence[Any]) -> None:
        plain: list[Any] = [v.contiguous() if isinstance(v, Tensor) else v for v in values]
        self.given = given = Arguments(*plain)
        self.noise = None if given.noise is None else given.noise.float()
        x = given.x
        for name, value in given._asdict().items():
            if isinstance(value, Tensor) and name != "noise" and value.dtype != x.dtype:
                raise TypeError(f"{name}: got dtype {value.dtype}, expected {x.dtype} as x")
            # Offsets into weights are 32-bit integers; those into what grows with tokens are not.
            if name in _WEIGHTS and isinstance(value, Tensor) and value.numel() >= 2**30:
                raise ValueError(f"{name}: got {value.numel()} elements, expected below 2**30")
        if x.dtype == torch.float64:
            raise TypeError("x: got dtype torch.float64, expected float32, bfloat16 or float16")
        self.attributes, self.rank, self.experts = given.gate.shape
        if self.experts > MOST_EXPERTS:
            raise ValueError(
                f"gate: got {self.experts} experts, expected at most {MOST_EXPERTS} in Triton"
            )
        self.tokens, self.in_width = x.shape
        self.width = self.in_width // self.attributes
        self.out = given.weight.shape[0] // self.attributes
        self.hidden = given.fc1_weight.shape[1]
        self.rows = self.tokens * self.attributes
        self.narrow = x.dtype != torch.float32
        # Large tiles need tensor cores, and rows that begin at a multiple of 16 bytes: else every
        # element has an address of its own, and registers run out.
        sizes = (self.width, self.out, self.rank, self.hidden)
        self.large = self.narrow and all(size % 8 == 0 for size in sizes)
        self.padded_experts = padded(self.experts)
        # All experts run on all rows, unrolled.
        self.dense = (
            (self.large or INTERPRETED)
            and self.experts < 4 * given.top_k
            and self.experts <= MOST_UNROLLED
        )
        # A program takes a row's whole rank; a narrow one with the down product before it.
        self.whole = (
            UNPROVEN
            and self.dense
            and padded(self.rank) <= MOST_WHOLE
            and self.hidden <= MOST_HIDDEN
        )
        # Its backward keeps experts in registers.
        self.registers = UNPROVEN and self.dense and padded(self.hidden) <= MOST_IN_REGISTERS
        # The up product is more K of the frozen one: x is copied for it, and W at every call.
        self.joint = self.attributes <= 2 and (
            self.tokens >= MANY and self.out * self.attributes >= 2 * self.in_width
        )

    def plain(self, *shape: int) -> Tensor:
        """Memory in the type of x."""
        return self.given.x.new_empty(shape)

    def wide(self, *shape: int) -> Tensor:
        return self.given.x.new_empty(shape, dtype=torch.float32)

    def grid(self, tile: int) -> tuple[int, int]:
        return triton.cdiv(self.tokens, tile), self.attributes

    def tiles(self, given: Tiles) -> dict[str, Any]:
        """Meta-parameters of a kernel that goes through the mixture."""
        return {
            "BM": given.tokens,
            "BC": min(padded(self.rank), given.columns),
            "BH": min(padded(self.hidden), given.hidden),
            "BN": min(padded(self.experts * self.hidden), given.joint),
            "DENSE": self.dense,
            "EP": self.padded_experts,
            "num_warps": given.warps,
            "num_stages": given.stages,
        }


@contextmanager
def unproven(value: bool) -> Iterator[None]:
    """Inside, layers run, or do not run, what no GPU has run yet."""
    global UNPROVEN
    before, UNPROVEN = UNPROVEN, value
    try:
        yield
    finally:
        UNPROVEN = before


def padded(size: int) -> int:
    """A power of two that tl.dot takes."""
    return max(16, int(triton.next_power_of_2(size)))


class Prepared(NamedTuple):
    """What both passes fold into weights."""

    folded: Tensor  # [r, d]
    column_sums: Tensor  # [r], of folded as it was rounded
    shift: Tensor  # [r]
    # [A, out / A, r], scaler folded in; or, `joint`, [A, out / A, K] with the frozen weight and
    # bias, K = r + in + ONES.
    right: Tensor
    counter: Tensor | None  # [1], 0


ONES = 64  # columns of the bias in a joint product, of which one counts: rows stay aligned


_ROWS = 4  # of a program that takes moments


def prepare(
    layer: Layer, *, counts: bool, joint: bool = False, statistics: Tensor | None = None
) -> Prepared:
    """Folded weights; into `statistics` [3, A, T] norm1's, where it is given."""
    given = layer.given
    columns = layer.rank + (layer.in_width + ONES if joint else 0)
    right = layer.plain(layer.attributes, layer.out, columns)
    prepared = Prepared(
        layer.plain(layer.rank, layer.width), layer.wide(layer.rank), layer.wide(layer.rank),
        right, given.x.new_empty(1, dtype=torch.int32) if counts else None,
    )  # fmt: skip
    flat = triton.cdiv(right.numel(), FLAT)
    tiles = 0 if statistics is None else triton.cdiv(layer.rows, _ROWS)
    launch(
        products.prepare, (layer.rank + flat + tiles,),
        given.norm1_weight, given.norm1_bias, given.down, given.up, given.scaler,
        given.weight if joint else None, given.bias if joint else None, *prepared,
        None if statistics is None else given.x, statistics, layer.tokens, flat, given.norm_eps,
        layer.width, layer.rank, layer.out, layer.attributes, ONES=ONES, BLOCK=FLAT, BM=_ROWS,
        BW=min(padded(layer.width), 2 * FLAT),
    )  # fmt: skip
    return prepared


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """A product, of matrices or batches, accumulated and kept in float32."""
    product = torch.mm if a.dim() == 2 else torch.bmm
    if a.is_cuda and a.dtype != torch.float32:
        return product(a, b, out_dtype=torch.float32)
    return product(a, b).float()
