"""ScaleMAE's way from a map to pixels in Triton: a vendor's products and what lies between them.

The first product's result is left as it comes, [pixels of x, k k E]: a pixel of the k times larger
map is found in it by `place`, so that no map is laid out anew. Its GELU is formed where it is read,
nine times over: operations that a GPU has to spare, where a pass over memory costs. Backward makes
the products again, but for the first where its result is kept. Some images are worked on at a time,
as many as `_AT_ONCE` allows.
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
_AT_ONCE = 1 << 27  # values of the widest map

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
        there = (row >= 0) & (row < height * K) & (column >= 0) & (column < width * K)
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
    for tap in tl.static_range(9):
        row, column = y + 1 - tap // 3, x + 1 - tap % 3
        there = (row >= 0) & (row < height * K) & (column >= 0) & (column < width * K)
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
        there = (row >= 0) & (row < height * K) & (column >= 0) & (column < width * K)
        full = (there & (p < end))[:, None] & (c < E)[None, :]
        at = place(image, row, column, height, width, K, E)[:, None] + c[None, :]
        from_ = tl.load(wide + at, full, 0.0).to(tl.float32)
        by = p.to(tl.int64)[:, None] * (E // 2) + c[None, :] // 2
        total += tl.sum(tl.load(grad + by, full, 0.0).to(tl.float32) * from_ * below(from_), 0)
        begin += BP
    tl.store(parts + (program.to(tl.int64) * 9 + tap) * E + c, total, c < E)


@triton.jit(do_not_specialize=["count"])
def gelu(x, out, slope, count, BLOCK: tl.constexpr):
    """out = GELU(x), slope its derivative; out may be x."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < count, 0.0).to(tl.float32)
    tl.store(out + i, (value * below(value)).to(out.dtype.element_ty), i < count)
    if slope is not None:
        tl.store(slope + i, gelu_slope(value).to(slope.dtype.element_ty), i < count)


class _Head(NamedTuple):
    """Weights as products take them, [in, out]; the taps [9, E]."""

    expand: Tensor
    expand_bias: Tensor
    taps: Tensor
    taps_bias: Tensor
    mix: Tensor
    mix_bias: Tensor
    project: Tensor
    project_bias: Tensor
    up: int
    down: int

    @staticmethod
    def of(weights: Sequence[Tensor]) -> _Head:
        expand, expand_bias, grouped, grouped_bias, mix, mix_bias, project, project_bias = weights
        up, down = expand.shape[2], project.shape[2]
        return _Head(
            expand.permute(0, 2, 3, 1).flatten(1),
            expand_bias.repeat(up * up),
            grouped.permute(2, 3, 0, 1).reshape(9, -1).contiguous(),
            grouped_bias.contiguous(),
            mix.flatten(1).t(),
            mix_bias,
            project.permute(0, 2, 3, 1).flatten(1),
            project_bias.repeat(down * down),
            up,
            down,
        )

    @property
    def channels(self) -> int:
        """Of the large map."""
        return self.taps.shape[1]

    def expanded(self, x: Tensor) -> Tensor:
        """The first product's result, [pixels of x, k k E], of x [pixels, D]."""
        return torch.addmm(self.expand_bias, x, self.expand)


class _Part:
    """Some images of a call: x [images, h, w, D], and `wide`, [images, h, w, k k E], if kept."""

    def __init__(self, head: _Head, x: Tensor, wide: Tensor | None = None) -> None:
        self.head, self.x = head, x.flatten(0, 2)
        self.images, self.height, self.width, _ = x.shape
        self.pixels = len(self.x) * head.up**2
        self.wide = head.expanded(self.x) if wide is None else wide.flatten(0, 2)
        self.sizes = (self.pixels, self.height, self.width)
        self.tile = {"K": head.up, "E": head.channels, "BP": _PIXELS}

    def _grid(self, channels: int, *more: int) -> tuple[dict[str, int], tuple[int, ...]]:
        block = min(_CHANNELS, triton.next_power_of_2(channels))
        across = triton.cdiv(channels, block)
        return {**self.tile, "BC": block}, (triton.cdiv(self.pixels, _PIXELS), across, *more)

    def grouped(self, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """[pixels, E/2] behind the grouped convolution's GELU, and the derivative there."""
        half = self.head.channels // 2
        out = self.x.new_empty(self.pixels, half)
        slopes = torch.empty_like(out) if slope else None
        tile, grid = self._grid(half)
        launch(
            group, grid, self.wide, self.head.taps, self.head.taps_bias, out, slopes, *self.sizes,
            **tile,
        )  # fmt: skip
        return out, slopes

    def mixed(self, half: Tensor, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """[pixels, M] behind the third GELU, and the derivative there."""
        out = torch.addmm(self.head.mix_bias, half, self.head.mix)
        slopes = torch.empty_like(out) if slope else None
        block = 1024
        launch(gelu, (triton.cdiv(out.numel(), block),), out, out, slopes, out.numel(), BLOCK=block)
        return out, slopes

    def pixels_of(self, values: Tensor) -> Tensor:
        """[pixels, n n C] as [images, rows, columns, C] of pixels."""
        down, lines = self.head.down, self.height * self.head.up
        parts = values.view(self.images, lines, -1, down, down, values.shape[1] // down**2)
        moved: Tensor = parts.permute(0, 1, 3, 2, 4, 5)
        return moved.reshape(self.images, lines * down, -1, parts.shape[5])

    def values_of(self, grad: Tensor) -> Tensor:
        """The way back: [pixels, n n C] of [images, rows, columns, C]."""
        down = self.head.down
        parts = grad.unflatten(2, (-1, down)).unflatten(1, (-1, down))
        values: Tensor = parts.permute(0, 1, 3, 2, 4, 5).reshape(self.pixels, -1)
        return values

    def spread(self, half_grad: Tensor) -> Tensor:
        """The gradient of `wide`."""
        out = torch.empty_like(self.wide)
        tile, grid = self._grid(self.head.channels)
        launch(spread, grid, half_grad, self.wide, self.head.taps, out, *self.sizes, **tile)
        return out

    def tap_gradients(self, half_grad: Tensor) -> Tensor:
        """Of the grouped convolution's weight, [9, E] in float32."""
        channels = self.head.channels
        span = max(_LEAST, triton.cdiv(self.pixels, _MOST))
        programs = triton.cdiv(self.pixels, span)
        parts = self.x.new_empty(programs, 9 * channels, dtype=torch.float32)
        tile, (_, across) = self._grid(channels)
        launch(
            tap_gradients, (programs, across, 9),
            half_grad, self.wide, parts, *self.sizes, span, **tile,
        )  # fmt: skip
        total = parts.new_empty(9, channels)
        block = min(16, triton.next_power_of_2(9 * channels))
        launch(
            join_sums, (triton.cdiv(9 * channels, block),),
            parts, total, programs, 9 * channels, BN=_JOINED, BC=block,
        )  # fmt: skip
        return total


def _parts(head: _Head, x: Tensor, wide: Tensor | None = None) -> Iterator[tuple[slice, _Part]]:
    rows = x.permute(0, 2, 3, 1).contiguous()
    values = rows[:1].numel() // max(rows.shape[-1], 1) * head.up**2 * head.channels
    most = max(1, _AT_ONCE // max(values, 1))
    for first in range(0, len(rows), most):
        part = slice(first, min(first + most, len(rows)))
        yield part, _Part(head, rows[part], None if wide is None else wide[part])


def pixel_head(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """As ``heads_reference.pixel_head_saving``."""
    *weights, keep = others
    head = _Head.of(weights)
    wide = None
    if keep:
        rows = x.permute(0, 2, 3, 1)
        wide = head.expanded(rows.flatten(0, 2)).view(*rows.shape[:3], head.up**2 * head.channels)
    scale = head.up * head.down
    bands = weights[6].shape[1]
    out = x.new_empty(len(x), x.shape[2] * scale, x.shape[3] * scale, bands)
    for images, part in _parts(head, x, wide):
        half, _ = part.grouped(slope=False)
        mixed, _ = part.mixed(half, slope=False)
        out[images] = part.pixels_of(torch.addmm(head.project_bias, mixed, head.project))
    return out.permute(0, 3, 1, 2), x.new_empty(0) if wide is None else wide


def _gradients(head: _Head, part: _Part, grad: Tensor, wanted: Sequence[bool]) -> dict[int, Tensor]:
    """By place among the arguments; of weights in float32 and as `_Head` has them."""

    def of_rows(rows: Tensor) -> Tensor:
        return rows.sum(0, dtype=torch.float32)

    found: dict[int, Tensor] = {}
    to_mix, to_group, to_expand = (any(wanted[:stage]) for stage in (7, 5, 3))
    half, half_slope = part.grouped(slope=to_group)
    mixed, mixed_slope = part.mixed(half, slope=to_mix)
    values = part.values_of(grad)
    if wanted[7]:
        found[7] = (mixed.t() @ values).float()
    if wanted[8]:
        found[8] = of_rows(values)
    del mixed
    if mixed_slope is None:
        return found
    mixed_grad = (values @ head.project.t()).mul_(mixed_slope)
    del mixed_slope
    if wanted[5]:
        found[5] = (half.t() @ mixed_grad).float()
    if wanted[6]:
        found[6] = of_rows(mixed_grad)
    if half_slope is None:
        return found
    half_grad = (mixed_grad @ head.mix.t()).mul_(half_slope)
    if wanted[3]:
        found[3] = part.tap_gradients(half_grad)
    if wanted[4]:
        found[4] = of_rows(half_grad)
    if not to_expand:
        return found
    wide_grad = part.spread(half_grad)
    if wanted[1]:
        found[1] = (part.x.t() @ wide_grad).float()
    if wanted[2]:
        found[2] = of_rows(wide_grad)
    if wanted[0]:
        found[0] = wide_grad @ head.expand.t()
    return found


def pixel_head_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted, in the order of the arguments."""
    *inputs, keep, saved, wanted = values
    x, *weights = inputs
    grad = output_grads[0]
    if grad is None or len(x) == 0:
        return [
            torch.zeros_like(value)
            for value, wants in zip(inputs, wanted[:-1], strict=True)
            if wants
        ]
    head, rows = _Head.of(weights), grad.permute(0, 2, 3, 1)
    totals: dict[int, Tensor] = {}
    of_x = []
    for images, part in _parts(head, x, saved[0] if keep else None):
        found = _gradients(head, part, rows[images], wanted)
        if 0 in found:
            of_x.append(found.pop(0))
        totals = {key: totals[key] + value if totals else value for key, value in found.items()}
    up, down = head.up, head.down
    layouts = {
        1: lambda g: g.unflatten(1, (up, up, -1)).permute(0, 3, 1, 2),
        2: lambda g: g.unflatten(0, (up * up, -1)).sum(0),
        3: lambda g: g.view(3, 3, -1, 2).permute(2, 3, 0, 1),
        5: lambda g: g.t()[:, :, None, None],
        7: lambda g: g.unflatten(1, (down, down, -1)).permute(0, 3, 1, 2),
        8: lambda g: g.unflatten(0, (down * down, -1)).sum(0),
    }
    results = []
    if of_x:
        whole = torch.cat(of_x).view(len(x), x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)
        results.append(torch.empty_like(x).copy_(whole))
    for key in sorted(totals):
        laid_out = layouts.get(key, lambda g: g)(totals[key])
        results.append(torch.empty_like(inputs[key]).copy_(laid_out))
    return results


def compilations() -> Iterator[Compilation]:
    """What the operator compiles: ScaleMAE's higher head."""
    for dtype in ("bfloat16", "float32", "float16"):
        shapes = (
            (1, 512, 56, 56), (512, 256, 4, 4), (256,), (128, 2, 3, 3), (128,), (256, 128, 1, 1),
            (256,), (256, 13, 2, 2), (13,),
        )  # fmt: skip
        tensors = [torch.empty(s, dtype=getattr(torch, dtype), device="meta") for s in shapes]
        grad = torch.empty(1, 13, 448, 448, dtype=getattr(torch, dtype), device="meta")
        with recorded() as launches:
            pixel_head(*tensors, False)
            pixel_head_backward([grad], *tensors, False, [], [True] * 9 + [False])
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape="512 channels at 56 x 56")
