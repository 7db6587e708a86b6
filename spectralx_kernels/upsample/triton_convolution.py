"""`upsample_conv2d` in Triton: the vendor's products, and the interpolating sums around them.

Kernels are in ``triton_axis.py``; what is launched and why is in README.md. By the definition
("map") all but the transpose of the upsampling is the vendor's, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._layouts import is_channels_last
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels.upsample.reference import resize, upsample_conv2d_by_map
from spectralx_kernels.upsample.triton_axis import Axis, interpolate, spread
from spectralx_kernels.upsample.triton_norm import Parts, channel_moments, joined_moments

# Positions and channels of a tile. The interpreter's time goes by operations, whatever their size.
_POSITIONS, _CHANNELS = (64, 256) if INTERPRETED else (16, 64)


class Arguments(NamedTuple):
    """The operator's arguments, in its order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    addend: Tensor | None
    size: list[int]
    padding: list[int]
    align_corners: bool
    by_taps: bool
    relu: bool = False


class Sizes:
    """Sides of the maps, and the memory of what is between them."""

    def __init__(self, given: Arguments) -> None:
        self.batch, self.channels, self.height, self.width = given.x.shape
        self.outs, _, self.ky, self.kx = given.weight.shape
        self.rows = Axis.of(self.height, given.size[0], given.align_corners)
        self.columns = Axis.of(self.width, given.size[1], given.align_corners)
        self.padding = given.padding
        self.out_height = given.size[0] + 2 * given.padding[0] - self.ky + 1
        self.out_width = given.size[1] + 2 * given.padding[1] - self.kx + 1

    def taps(self, weight: Tensor) -> Tensor:
        """The kernel as the products read it, [ky * kx * O, C]."""
        return weight.permute(2, 3, 0, 1).reshape(self.ky * self.kx * self.outs, self.channels)

    def products(self, x: Tensor) -> Tensor:
        """Memory for [B, h, w, ky, kx, O]."""
        return x.new_empty(self.batch, self.height, self.width, self.ky, self.kx, self.outs)

    def lines(self, x: Tensor) -> Tensor:
        """Memory for what the sum over rows makes of them, [B, H', w, kx, O] in float32."""
        return x.new_empty(
            self.batch, self.out_height, self.width, self.kx, self.outs, dtype=torch.float32
        )  # fmt: skip


def _tiles(positions: int, inner: int) -> tuple[int, dict[str, int]]:
    bp = min(_POSITIONS, triton.next_power_of_2(positions))
    bm = min(_CHANNELS, triton.next_power_of_2(inner))
    return triton.cdiv(positions, bp) * triton.cdiv(inner, bm), {"BP": bp, "BM": bm}


def _pixels(x: Tensor) -> Tensor:
    """[B, C, h, w] as [B * h * w, C]: without a copy where channels are side by side."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()


def _strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """Of the indices (image, row), column and channel, as the columns' kernels take them."""
    if x is None:
        return 0, 0, 0, 0
    return x.stride(0), x.stride(2), x.stride(3), x.stride(1)


def _by_taps(given: Arguments, out: Tensor, with_moments: bool) -> Tensor | None:
    """Fills `out`; its moments where asked."""
    s = Sizes(given)
    products = s.products(given.x)
    torch.mm(
        _pixels(given.x), s.taps(given.weight).t(), out=products.view(-1, s.ky * s.kx * s.outs)
    )
    lines = s.lines(given.x)
    inner = s.kx * s.outs
    programs, tile = _tiles(s.out_height, inner)
    launch(
        interpolate, (s.batch * s.width * programs,),
        products, None, None, lines,
        s.width, inner, s.out_height, s.padding[0], *s.rows,
        s.height * s.width * s.ky * inner, s.ky * inner, inner, s.width * s.ky * inner, 1,
        s.out_height * s.width * inner, inner, s.width * inner, 1, *_strides(None), None, None,
        TAPS=s.ky, RELU=False, **tile,
    )  # fmt: skip
    programs, tile = _tiles(s.out_width, s.outs)
    parts = None
    if with_moments:
        tiles = triton.cdiv(s.out_width, tile["BP"])
        parts = Parts.empty(given.x, s.batch * s.out_height * tiles, s.outs)
    launch(
        interpolate, (s.batch * s.out_height * programs,),
        lines, None if given.bias is None else given.bias.contiguous(), given.addend, out,
        s.out_height, s.outs, s.out_width, s.padding[1], *s.columns,
        s.out_height * s.width * inner, s.width * inner, s.outs, inner, 1,
        *_strides(out), *_strides(given.addend), *(parts or (None, None)),
        TAPS=s.kx, RELU=given.relu, **tile,
    )  # fmt: skip
    return None if parts is None else joined_moments(parts)


def _convolved(given: Arguments, with_moments: bool) -> tuple[Tensor, Tensor | None]:
    """The output and, where asked, its moments."""
    x, weight = given.x, given.weight
    last = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    if not given.by_taps:
        out = upsample_conv2d_by_map(
            x, weight, given.bias, given.size, given.padding, given.align_corners
        )
        if given.addend is not None:
            out = out + given.addend
        out = (torch.relu(out) if given.relu else out).contiguous(memory_format=last)
        return out, channel_moments(out) if with_moments else None
    s = Sizes(given)
    shape = (s.batch, s.outs, s.out_height, s.out_width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)
    if s.batch == 0:
        return out, channel_moments(out) if with_moments else None
    return out, _by_taps(given, out, with_moments)


def upsample_conv2d(*values: Any) -> Tensor:
    """As ``reference.upsample_conv2d``."""
    return _convolved(Arguments(*values), False)[0]


def upsample_conv2d_moments(*values: Any) -> tuple[Tensor, Tensor]:
    """As ``reference.upsample_conv2d_moments``."""
    out, moments = _convolved(Arguments(*values), True)
    assert moments is not None
    return out, moments


def _products_gradient(given: Arguments, s: Sizes, grad: Tensor) -> Tensor:
    """Of the 1x1 products, [B * h * w, ky * kx * O], in the dtype of `x`."""
    lines, inner = s.lines(given.x), s.kx * s.outs
    programs, tile = _tiles(s.width, s.outs)
    launch(
        spread, (s.batch * s.out_height * s.kx * programs,),
        grad, None, None, lines,
        s.out_height, s.outs, s.out_width, s.padding[1], *s.columns,
        *_strides(grad),
        s.out_height * s.width * inner, s.width * inner, s.outs, inner, 1,
        TAPS=s.kx, **tile,
    )  # fmt: skip
    products = s.products(given.x)
    programs, tile = _tiles(s.height, inner)
    launch(
        spread, (s.batch * s.width * s.ky * programs,),
        lines, None, None, products,
        s.width, inner, s.out_height, s.padding[0], *s.rows,
        s.out_height * s.width * inner, inner, s.width * inner, 1,
        s.height * s.width * s.ky * inner, s.ky * inner, inner, s.width * s.ky * inner, 1,
        TAPS=s.ky, **tile,
    )  # fmt: skip
    return products.view(-1, s.ky * inner)


def _downsampled(grad: Tensor, s: Sizes) -> Tensor:
    """The transpose of the upsampling, [B, C, H, W] -> [B, C, h, w], without atomics."""
    grad = grad.contiguous()
    rows, columns, planes = s.rows, s.columns, s.batch * s.channels
    if planes == 0 or (rows.step == 0 and columns.step == 0):
        return grad
    lines = grad.new_empty(planes, rows.length, columns.size, dtype=torch.float32)
    programs, tile = _tiles(rows.length, columns.size)
    launch(
        spread, (planes * programs,),
        grad, None, None, lines,
        1, columns.size, rows.size, 0, *rows,
        rows.size * columns.size, 0, columns.size, 1,
        rows.length * columns.size, 0, 0, columns.size, 1,
        TAPS=1, **tile,
    )  # fmt: skip
    out = grad.new_empty(s.batch, s.channels, rows.length, columns.length)
    programs, tile = _tiles(columns.length, rows.length)
    launch(
        spread, (planes * programs,),
        lines, None, None, out,
        1, rows.length, columns.size, 0, *columns,
        rows.length * columns.size, 0, 1, columns.size,
        rows.length * columns.length, 0, 0, 1, columns.length,
        TAPS=1, **tile,
    )  # fmt: skip
    return out


def upsample_conv2d_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted of x, weight, bias and addend, laid out as those are."""
    *inputs, saved, mask = values
    given = Arguments(*inputs)
    wants_x, wants_weight, wants_bias, wants_addend = mask[:4]
    tensors = (given.x, given.weight, given.bias, given.addend)
    grad = output_grads[0]
    if grad is None or given.x.shape[0] == 0:
        return [
            torch.zeros_like(value)
            for value, wants in zip(tensors, mask[:4], strict=True)
            if value is not None and wants
        ]
    if given.relu:
        grad = torch.ops.aten.threshold_backward(grad, saved[0], 0)
    s = Sizes(given)
    found: list[Tensor | None] = [None] * 4
    if wants_addend:
        found[3] = grad
    if wants_bias:
        found[2] = grad.sum((0, 2, 3))
    if given.by_taps and (wants_x or wants_weight):
        products = _products_gradient(given, s, grad)
        if wants_x:
            small = torch.mm(products, s.taps(given.weight))
            small = small.view(s.batch, s.height, s.width, s.channels)
            found[0] = small.permute(0, 3, 1, 2)
        if wants_weight:
            kernel = torch.mm(products.t(), _pixels(given.x))
            kernel = kernel.view(s.ky, s.kx, s.outs, s.channels)
            found[1] = kernel.permute(2, 3, 0, 1)
    elif wants_x or wants_weight:
        large = resize(given.x, given.size, given.align_corners)
        large_grad, found[1], _ = torch.ops.aten.convolution_backward(
            grad, large, given.weight, None, [1, 1], given.padding, [1, 1], False, [0, 0], 1,
            [wants_x, wants_weight, False],
        )  # fmt: skip
        if wants_x:
            found[0] = _downsampled(large_grad, s)
    # Never the incoming gradient itself, nor one of another layout than its input.
    return [
        torch.empty_like(value).copy_(each)
        for value, each in zip(tensors, found, strict=True)
        if value is not None and each is not None
    ]


def upsample_conv2d_moments_backward(
    output_grads: Sequence[Tensor | None], *values: Any
) -> list[Tensor]:
    """As `upsample_conv2d_backward`; the moments have no gradient."""
    *inputs, saved, mask = values
    return upsample_conv2d_backward(output_grads[:1], *inputs, False, saved, [*mask, False])


# Channels, sides: UPerNet's bottleneck on a plain map, and no round number.
_SHAPES = {
    "512, 14 to 56": (512, 512, 14, 56, True),
    "channels last": (512, 512, 14, 56, True),
    "33 to 19, 5 to 12": (33, 19, 5, 12, True),
    "map": (64, 64, 14, 56, False),
}


def compilations() -> Iterator[Compilation]:
    """What both passes compile: in bfloat16 at all shapes, the other types at the first."""
    cases = [("bfloat16", shape) for shape in _SHAPES]
    for dtype, shape in [*cases, ("float32", "512, 14 to 56"), ("float16", "512, 14 to 56")]:
        channels, outs, small, large, by_taps = _SHAPES[shape]
        like = torch.empty(0, dtype=getattr(torch, dtype), device="meta")
        x, out = like.new_empty(2, channels, small, small), like.new_empty(2, outs, large, large)
        if shape == "channels last":
            x, out = (map_.to(memory_format=torch.channels_last) for map_ in (x, out))
        weight, bias = like.new_empty(outs, channels, 3, 3), like.new_empty(outs)
        given = (x, weight, bias, out, [large, large], [1, 1], False, by_taps, True)
        with recorded() as launches:
            upsample_conv2d_backward(
                [out], *given, [upsample_conv2d(*given)], [True] * 4 + [False] * 5
            )
            if by_taps:
                upsample_conv2d_moments(*given[:-1])
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape=shape)
