"""The grouped 3x3 convolution between two GELUs in Triton, of a map or of what a product left.

The map is [pixels, k k E] of a smaller one's pixels, k = 1 for one of its own: a pixel is found in
it by `place`, so that no map is laid out anew. Its GELU is formed where it is read, nine times
over: operations that a GPU has to spare, where a pass over memory costs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels._triton_gelu import below, gelu_slope
from spectralx_kernels.upsample.triton_norm import join_sums

# Pixels and channels of a tile; the least pixels and the most number of parts of sums over pixels.
_PIXELS, _CHANNELS = (256, 256) if INTERPRETED else (32, 32)
_LEAST, _MOST = 256, 512
_JOINED = 32

_COUNTS = ["pixels", "height", "width", "span"]


@triton.jit
def place(image, y, x, height, width, K: tl.constexpr, E: tl.constexpr):
    """Where the channels of a pixel of the large map begin; height and width are of the small."""
    small = (image.to(tl.int64) * height + y // K) * width + x // K
    return ((small * K + y % K) * K + x % K) * E


@triton.jit
def split(p, height, width, K: tl.constexpr):
    """Image, row and column of pixels p of the large map."""
    line, lines = width * K, height * K
    return p // (line * lines), p // line % lines, p % line


@triton.jit
def inside(row, column, height, width, K: tl.constexpr):
    """Whether the large map has these pixels."""
    return (row >= 0) & (row < height * K) & (column >= 0) & (column < width * K)


@triton.jit(do_not_specialize=_COUNTS)
def group(
    wide, taps, bias, out, slope, pixels, height, width,
    K: tl.constexpr, E: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = GELU of the grouped 3x3 convolution of GELU(wide), slope its derivative there."""
    half: tl.constexpr = E // 2
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    image, y, x = split(p, height, width, K)
    value = tl.zeros([BP, BC], tl.float32)
    value += tl.load(bias + c, c < half, 0.0).to(tl.float32)[None, :]
    for tap in range(9):  # unrolled it spills
        row, column = y + tap // 3 - 1, x + tap % 3 - 1
        there = inside(row, column, height, width, K)
        full = (there & (p < pixels))[:, None] & (c < half)[None, :]
        at = place(image, row, column, height, width, K, E)[:, None] + 2 * c[None, :]
        for pair in tl.static_range(2):
            by = tl.load(taps + tap * E + 2 * c + pair, c < half, 0.0).to(tl.float32)
            from_ = tl.load(wide + at + pair, full, 0.0).to(tl.float32)
            value += from_ * below(from_) * by[None, :]
    full = (p < pixels)[:, None] & (c < half)[None, :]
    to = p.to(tl.int64)[:, None] * half + c[None, :]
    tl.store(out + to, (value * below(value)).to(out.dtype.element_ty), full)
    if slope is not None:
        tl.store(slope + to, gelu_slope(value).to(slope.dtype.element_ty), full)


@triton.jit(do_not_specialize=_COUNTS)
def spread(
    grad, wide, taps, out, pixels, height, width,
    K: tl.constexpr, E: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = gradient of `wide` for that of what the grouped convolution gave, before its GELU."""
    half: tl.constexpr = E // 2
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    image, y, x = split(p, height, width, K)
    value = tl.zeros([BP, BC], tl.float32)
    for tap in range(9):  # unrolled it spills
        row, column = y + 1 - tap // 3, x + 1 - tap % 3
        there = inside(row, column, height, width, K)
        full = (there & (p < pixels))[:, None] & (c < E)[None, :]
        from_ = ((image.to(tl.int64) * height * K + row) * width * K + column)[:, None] * half
        by = tl.load(taps + tap * E + c, c < E, 0.0).to(tl.float32)
        value += tl.load(grad + from_ + c[None, :] // 2, full, 0.0).to(tl.float32) * by[None, :]
    full = (p < pixels)[:, None] & (c < E)[None, :]
    at = place(image, y, x, height, width, K, E)[:, None] + c[None, :]
    value *= gelu_slope(tl.load(wide + at, full, 0.0).to(tl.float32))
    tl.store(out + at, value.to(out.dtype.element_ty), full)


@triton.jit(do_not_specialize=_COUNTS)
def tap_gradients(
    grad, wide, parts, pixels, height, width, span,
    K: tl.constexpr, E: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts [programs, 9, E]: gradients of one tap of the taps over `span` pixels."""
    program, tap = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    begin = program * span
    end = tl.minimum(begin + span, pixels)
    while begin < end:
        p = begin + tl.arange(0, BP)
        image, y, x = split(p, height, width, K)
        row, column = y + tap // 3 - 1, x + tap % 3 - 1
        there = inside(row, column, height, width, K)
        full = (there & (p < end))[:, None] & (c < E)[None, :]
        at = place(image, row, column, height, width, K, E)[:, None] + c[None, :]
        from_ = tl.load(wide + at, full, 0.0).to(tl.float32)
        by = p.to(tl.int64)[:, None] * (E // 2) + c[None, :] // 2
        total += tl.sum(tl.load(grad + by, full, 0.0).to(tl.float32) * from_ * below(from_), 0)
        begin += BP
    tl.store(parts + (program.to(tl.int64) * 9 + tap) * E + c, total, c < E)


def taps_of(weight: Tensor) -> Tensor:
    """[9, E] of a weight [E/2, 2, 3, 3]."""
    return weight.permute(2, 3, 0, 1).reshape(9, -1).contiguous()


def weight_of(taps: Tensor) -> Tensor:
    """The way back."""
    return taps.view(3, 3, -1, 2).permute(2, 3, 0, 1)


class Grouped(NamedTuple):
    """A call: `wide` [images, height, width, up up E] contiguous, `taps` [9, E], `bias` [E/2]."""

    wide: Tensor
    taps: Tensor
    bias: Tensor
    up: int = 1

    @property
    def channels(self) -> int:
        return self.taps.shape[1]

    @property
    def pixels(self) -> int:
        return self.wide.numel() // self.channels

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.pixels, self.wide.shape[1], self.wide.shape[2]

    def _grid(self, channels: int, *more: int) -> tuple[dict[str, int], tuple[int, ...]]:
        block = min(_CHANNELS, triton.next_power_of_2(channels))
        across = triton.cdiv(channels, block)
        tile = {"K": self.up, "E": self.channels, "BP": _PIXELS, "BC": block}
        return tile, (triton.cdiv(self.pixels, _PIXELS), across, *more)

    def forward(self, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """[pixels, E/2] behind the second GELU, and the derivative there."""
        out = self.wide.new_empty(self.pixels, self.channels // 2)
        slopes = torch.empty_like(out) if slope else None
        tile, grid = self._grid(self.channels // 2)
        launch(group, grid, self.wide, self.taps, self.bias, out, slopes, *self._sizes, **tile)
        return out, slopes

    def spread(self, half_grad: Tensor) -> Tensor:
        """The gradient of `wide`; `half_grad` is that before the second GELU."""
        out = torch.empty_like(self.wide)
        tile, grid = self._grid(self.channels)
        launch(spread, grid, half_grad, self.wide, self.taps, out, *self._sizes, **tile)
        return out

    def tap_gradients(self, half_grad: Tensor) -> Tensor:
        """Of the weight, [9, E] in float32."""
        span = max(_LEAST, triton.cdiv(self.pixels, _MOST))
        programs = triton.cdiv(self.pixels, span)
        parts = self.wide.new_empty(programs, 9 * self.channels, dtype=torch.float32)
        tile, (_, across) = self._grid(self.channels)
        launch(
            tap_gradients, (programs, across, 9),
            half_grad, self.wide, parts, *self._sizes, span, **tile,
        )  # fmt: skip
        total = parts.new_empty(9, self.channels)
        block = min(16, triton.next_power_of_2(9 * self.channels))
        launch(
            join_sums, (triton.cdiv(9 * self.channels, block),),
            parts, total, programs, 9 * self.channels, BN=_JOINED, BC=block,
        )  # fmt: skip
        return total


def _call(x: Tensor, weight: Tensor, bias: Tensor) -> Grouped:
    return Grouped(x.permute(0, 2, 3, 1).contiguous(), taps_of(weight), bias.contiguous())


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """[pixels, C] as [B, C, H, W] of the size of `like`."""
    return rows.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)


def gelu_grouped_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As ``heads_reference.gelu_grouped_conv2d``."""
    if x.numel() == 0:
        return x.new_empty(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)
    out, _ = _call(x, weight, bias).forward(slope=False)
    return _map(out, x)


def gelu_grouped_conv2d_backward(
    output_grads: Sequence[Tensor | None], *values: Any
) -> list[Tensor]:
    """The gradients wanted, in the order of the arguments."""
    *inputs, _, wanted = values
    x, grad = inputs[0], output_grads[0]
    if grad is None or x.numel() == 0:
        return [torch.zeros_like(v) for v, wants in zip(inputs, wanted, strict=True) if wants]
    call = _call(*inputs)
    half_grad = grad.permute(0, 2, 3, 1).contiguous().view(call.pixels, -1)
    _, slopes = call.forward(slope=True)
    assert slopes is not None
    half_grad = half_grad * slopes
    found = []
    if wanted[0]:
        found.append(torch.empty_like(x).copy_(_map(call.spread(half_grad), x)))
    if wanted[1]:
        found.append(torch.empty_like(inputs[1]).copy_(weight_of(call.tap_gradients(half_grad))))
    if wanted[2]:
        found.append(half_grad.sum(0, dtype=torch.float32).to(inputs[2].dtype))
    return found


def compilations() -> Iterator[Compilation]:
    """What the operator compiles: a block of ScaleMAE's decoder at 56 x 56."""
    for dtype in ("bfloat16", "float32", "float16"):
        shapes = ((1, 512, 56, 56), (256, 2, 3, 3), (256,))
        tensors = [torch.empty(s, dtype=getattr(torch, dtype), device="meta") for s in shapes]
        grad = torch.empty(1, 256, 56, 56, dtype=getattr(torch, dtype), device="meta")
        with recorded() as launches:
            gelu_grouped_conv2d(*tensors)
            gelu_grouped_conv2d_backward([grad], *tensors, [], [True] * 3)
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape="512 channels at 56 x 56")
