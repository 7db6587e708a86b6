"""Batch norm and ReLU of a map in Triton: statistics by parts, joined in order, and one pass on.

A map is read where it lies, its channels or its pixels side by side. A part is a fixed run of
pixels: no atomics, the same bits each time.
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
from spectralx_kernels._layouts import is_channels_last
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels.upsample.triton_axis import moments_of_tile

# Pixels and channels of a tile, the least pixels and the most number of parts, parts that one
# program joins. The interpreter's time goes by operations, whatever their size.
_PIXELS, _CHANNELS = (64, 64) if INTERPRETED else (32, 64)
_LEAST, _MOST = 128, 512
_JOINED = 32

_COUNTS = ["pixels", "area", "channels", "span", "count"]


@triton.jit
def pixel_offsets(p, area, image, pixel):
    """Of the pixels p of all images."""
    return (p // area).to(tl.int64) * image + (p % area).to(tl.int64) * pixel


@triton.jit
def normed(x, at, c, inside, moments, weight, bias, channels, eps):
    """A tile of x less its mean; scale and rstd by channel; what batch norm makes of it."""
    here = c < channels
    mean = tl.load(moments + c, here, 0.0)
    rstd = tl.rsqrt(tl.load(moments + channels + c, here, 1.0) + eps)
    scale = rstd
    if weight is not None:
        scale *= tl.load(weight + c, here, 0.0).to(tl.float32)
    off = tl.load(x + at, inside, 0.0).to(tl.float32) - mean[None, :]
    value = off * scale[None, :]
    if bias is not None:
        value += tl.load(bias + c, here, 0.0).to(tl.float32)[None, :]
    return off, scale, rstd, value


@triton.jit(do_not_specialize=_COUNTS)
def moments_by_part(
    x, parts, counts, pixels, area, channels, span, x_image, x_pixel, x_channel,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts[part] = mean and squared deviations of `span` pixels, counts[part] how many."""
    part = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    first = part * span
    last = tl.minimum(first + span, pixels)
    mean = tl.zeros([BC], tl.float32)
    squares = tl.zeros([BC], tl.float32)
    begin = first
    while begin < last:
        p = begin + tl.arange(0, BP)
        inside = (p < last)[:, None] & (c < channels)[None, :]
        at = pixel_offsets(p, area, x_image, x_pixel)[:, None]
        at += (c.to(tl.int64) * x_channel)[None, :]
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        n = tl.minimum(last - begin, BP).to(tl.float32)
        before = (begin - first).to(tl.float32)
        tile_mean, tile_squares = moments_of_tile(value, inside, n)
        delta = tile_mean - mean
        mean += delta * (n / (before + n))
        squares += tile_squares + delta * delta * (before * n / (before + n))
        begin += BP
    to = parts + part.to(tl.int64) * 2 * channels + c
    tl.store(to, mean, c < channels)
    tl.store(to + channels, squares, c < channels)
    if tl.program_id(0) == 0:
        tl.store(counts + part, (last - first).to(tl.float32))


@triton.jit(do_not_specialize=_COUNTS)
def join_moments(
    parts, counts, out, out_counts, count, span, channels,
    FINAL: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[group] = `span` parts made one, in order; as variances instead of squares if FINAL."""
    group = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    last = tl.minimum((group + 1) * span, count)
    mean = tl.zeros([BC], tl.float32)
    squares = tl.zeros([BC], tl.float32)
    before = 0.0
    begin = group * span
    while begin < last:
        i = begin + tl.arange(0, BN)
        inside = (i < last)[:, None] & (c < channels)[None, :]
        weights = tl.load(counts + i, i < last, 0.0)
        at = (i.to(tl.int64) * 2 * channels)[:, None] + c[None, :]
        means = tl.load(parts + at, inside, 0.0)
        n = tl.sum(weights, 0)
        tile_mean = tl.sum(means * weights[:, None], 0) / n
        off = means - tile_mean[None, :]
        tile_squares = tl.sum(tl.load(parts + at + channels, inside, 0.0), 0)
        tile_squares += tl.sum(off * off * weights[:, None], 0)
        delta = tile_mean - mean
        mean += delta * (n / (before + n))
        squares += tile_squares + delta * delta * (before * n / (before + n))
        before += n
        begin += BN
    if FINAL:
        squares = squares / tl.maximum(before, 1.0)
    elif tl.program_id(0) == 0:
        tl.store(out_counts + group, before)
    to = out + group.to(tl.int64) * 2 * channels + c
    tl.store(to, mean, c < channels)
    tl.store(to + channels, squares, c < channels)


@triton.jit(do_not_specialize=_COUNTS)
def normalize(
    x, moments, weight, bias, out, pixels, area, channels, eps,
    x_image, x_pixel, x_channel, out_image, out_pixel, out_channel,
    RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = relu((x - mean) * scale + bias)"""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    wide = c.to(tl.int64)[None, :]
    at = pixel_offsets(p, area, x_image, x_pixel)[:, None] + wide * x_channel
    _, _, _, value = normed(x, at, c, inside, moments, weight, bias, channels, eps)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    at = pixel_offsets(p, area, out_image, out_pixel)[:, None] + wide * out_channel
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_COUNTS)
def norm_sums(
    grad, x, moments, weight, bias, parts, pixels, area, channels, span, eps,
    grad_image, grad_pixel, grad_channel, x_image, x_pixel, x_channel,
    RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts[part] = sums over `span` pixels of dz and of dz times x as normalised."""
    part = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    wide = c.to(tl.int64)[None, :]
    last = tl.minimum((part + 1) * span, pixels)
    total = tl.zeros([BC], tl.float32)
    dot = tl.zeros([BC], tl.float32)
    begin = part * span
    while begin < last:
        p = begin + tl.arange(0, BP)
        inside = (p < last)[:, None] & (c < channels)[None, :]
        at = pixel_offsets(p, area, x_image, x_pixel)[:, None] + wide * x_channel
        off, _, rstd, value = normed(x, at, c, inside, moments, weight, bias, channels, eps)
        at = pixel_offsets(p, area, grad_image, grad_pixel)[:, None] + wide * grad_channel
        dz = tl.load(grad + at, inside, 0.0).to(tl.float32)
        if RELU:
            dz = tl.where(value <= 0, 0.0, dz)
        total += tl.sum(dz, 0)
        dot += tl.sum(tl.where(inside, dz * off, 0.0), 0) * rstd
        begin += BP
    to = parts + part.to(tl.int64) * 2 * channels + c
    tl.store(to, total, c < channels)
    tl.store(to + channels, dot, c < channels)


@triton.jit(do_not_specialize=_COUNTS)
def join_sums(parts, out, count, channels, BN: tl.constexpr, BC: tl.constexpr):
    """out[channels] = the parts added up in order."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros([BC], tl.float32)
    begin = 0
    while begin < count:
        i = begin + tl.arange(0, BN)
        inside = (i < count)[:, None] & (c < channels)[None, :]
        at = (i.to(tl.int64) * channels)[:, None] + c[None, :]
        total += tl.sum(tl.load(parts + at, inside, 0.0), 0)
        begin += BN
    tl.store(out + c, total, c < channels)


@triton.jit(do_not_specialize=_COUNTS)
def norm_gradient(
    grad, x, moments, weight, bias, totals, out, pixels, area, channels, eps,
    grad_image, grad_pixel, grad_channel, x_image, x_pixel, x_channel,
    out_image, out_pixel, out_channel,
    RELU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = scale * (dz - mean of dz - x as normalised * mean of dz times that); scale * dz
    without totals, where the moments do not depend on x."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    wide = c.to(tl.int64)[None, :]
    at = pixel_offsets(p, area, x_image, x_pixel)[:, None] + wide * x_channel
    off, scale, rstd, value = normed(x, at, c, inside, moments, weight, bias, channels, eps)
    at = pixel_offsets(p, area, grad_image, grad_pixel)[:, None] + wide * grad_channel
    dz = tl.load(grad + at, inside, 0.0).to(tl.float32)
    if RELU:
        dz = tl.where(value <= 0, 0.0, dz)
    if totals is not None:
        share = 1.0 / pixels.to(tl.float32)
        mean = tl.load(totals + c, c < channels, 0.0) * share
        slope = tl.load(totals + channels + c, c < channels, 0.0) * share * rstd
        dz = dz - mean[None, :] - off * slope[None, :]
    at = pixel_offsets(p, area, out_image, out_pixel)[:, None] + wide * out_channel
    tl.store(out + at, (dz * scale[None, :]).to(out.dtype.element_ty), inside)


class Parts(NamedTuple):
    """Mean and squared deviations by part, [parts, 2, C], and values in each, [parts]."""

    values: Tensor
    counts: Tensor

    @staticmethod
    def empty(x: Tensor, count: int, channels: int) -> Parts:
        """Memory for `count` of them."""
        return Parts(
            x.new_empty(count, 2, channels, dtype=torch.float32),
            x.new_empty(count, dtype=torch.float32),
        )


class _Map:
    """A map [B, C, H, W] whose pixels are evenly apart, and how its kernels are launched."""

    def __init__(self, x: Tensor) -> None:
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        self.x = x
        batch, self.channels, height, width = x.shape
        self.area, self.pixels = height * width, batch * height * width
        last = is_channels_last(x)
        size = self.channels * self.area
        self.strides = (size, self.channels, 1) if last else (size, 1, self.area)
        self.tile = {
            "BP": min(_PIXELS, triton.next_power_of_2(max(self.pixels, 1))),
            "BC": min(_CHANNELS, triton.next_power_of_2(self.channels)),
        }
        self.tiles = triton.cdiv(self.channels, self.tile["BC"])
        self.span = max(_LEAST, triton.cdiv(self.pixels, _MOST))
        self.parts = triton.cdiv(self.pixels, self.span)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.pixels, self.area, self.channels

    @property
    def by_tile(self) -> tuple[int, int]:
        """The grid of a pass that keeps nothing from tile to tile."""
        return self.tiles, triton.cdiv(self.pixels, self.tile["BP"])


def joined_moments(parts: Parts) -> Tensor:
    """Mean and biased variance, [2, C]; in two steps where there are many parts."""
    count, _, channels = parts.values.shape
    tile = {"BN": _JOINED, "BC": min(16, triton.next_power_of_2(channels))}
    tiles = triton.cdiv(channels, tile["BC"])
    span = 4 * _JOINED
    if count > 2 * span:
        groups = triton.cdiv(count, span)
        fewer = Parts.empty(parts.values, groups, channels)
        launch(
            join_moments, (tiles, groups),
            *parts, *fewer, count, span, channels, FINAL=False, **tile,
        )  # fmt: skip
        parts, count = fewer, groups
    out = parts.values.new_empty(2, channels)
    launch(
        join_moments, (tiles, 1), *parts, out, None, count, count, channels, FINAL=True, **tile
    )  # fmt: skip
    return out


def channel_moments(x: Tensor) -> Tensor:
    """As ``reference.channel_moments``."""
    m = _Map(x)
    if m.pixels == 0:
        return x.new_zeros(2, m.channels, dtype=torch.float32)
    parts = Parts.empty(x, m.parts, m.channels)
    launch(
        moments_by_part, (m.tiles, m.parts),
        m.x, *parts, *m.sizes, m.span, *m.strides, **m.tile,
    )  # fmt: skip
    return joined_moments(parts)


def _dense(
    moments: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the kernels read as rows of channels side by side."""
    weight, bias = (None if value is None else value.contiguous() for value in (weight, bias))
    return moments.float().contiguous(), weight, bias


def batch_norm_relu(
    x: Tensor, moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool,
    batch: bool,
) -> Tensor:  # fmt: skip
    """As ``reference.batch_norm_relu``."""
    m = _Map(x)
    moments, weight, bias = _dense(moments, weight, bias)
    out = torch.empty_like(m.x)
    if m.pixels:
        launch(
            normalize, m.by_tile,
            m.x, moments, weight, bias, out, *m.sizes, eps, *m.strides, *m.strides,
            RELU=relu, **m.tile,
        )  # fmt: skip
    return out


def batch_norm_relu_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted of x, moments, weight and bias."""
    x, moments, weight, bias, eps, relu, batch, _saved, mask = values
    grad = output_grads[0]
    tensors = (x, moments, weight, bias)
    m = _Map(x)
    if grad is None or m.pixels == 0:
        return [
            torch.zeros_like(value)
            for value, wants in zip(tensors, mask[:4], strict=True)
            if value is not None and wants
        ]
    g = _Map(grad)
    moments_, weight_, bias_ = _dense(moments, weight, bias)
    totals = None
    if (mask[0] and batch) or mask[2] or mask[3]:
        parts = x.new_empty(m.parts, 2 * m.channels, dtype=torch.float32)
        launch(
            norm_sums, (m.tiles, m.parts),
            g.x, m.x, moments_, weight_, bias_, parts, *m.sizes, m.span, eps,
            *g.strides, *m.strides, RELU=relu, **m.tile,
        )  # fmt: skip
        totals = parts.new_empty(2 * m.channels)
        tile = {"BN": _JOINED, "BC": min(16, triton.next_power_of_2(2 * m.channels))}
        launch(
            join_sums, (triton.cdiv(2 * m.channels, tile["BC"]),),
            parts, totals, m.parts, 2 * m.channels, **tile,
        )  # fmt: skip
    found: list[Tensor] = []
    if mask[0]:
        out = torch.empty_like(m.x)
        launch(
            norm_gradient, m.by_tile,
            g.x, m.x, moments_, weight_, bias_, totals if batch else None, out, *m.sizes, eps,
            *g.strides, *m.strides, *m.strides, RELU=relu, **m.tile,
        )  # fmt: skip
        found.append(out if out.stride() == x.stride() else torch.empty_like(x).copy_(out))
    if mask[1]:
        found.append(torch.zeros_like(moments))
    for place, value in ((2, weight), (3, bias)):
        if mask[place]:
            assert totals is not None
            part = totals[m.channels :] if place == 2 else totals[: m.channels]
            # Never a view of one buffer twice.
            found.append(part.to(value.dtype, copy=True))
    return found


def compilations() -> Iterator[Compilation]:
    """What both passes compile: in bfloat16 in both layouts, the other types in one."""
    for dtype, layout in (
        ("bfloat16", torch.channels_last),
        ("bfloat16", torch.contiguous_format),
        ("float32", torch.channels_last),
        ("float16", torch.channels_last),
    ):
        x = torch.empty(16, 512, 56, 56, dtype=getattr(torch, dtype), device="meta")
        x = x.contiguous(memory_format=layout)
        vector = torch.empty(512, device="meta")
        with recorded() as launches:
            moments = channel_moments(x)
            joined_moments(Parts.empty(x, 5000, 512))
            given = (x, moments, vector, vector, 1e-5, True, True)
            batch_norm_relu(*given)
            batch_norm_relu_backward([x], *given, [], [True, False, True, True] + [False] * 3)
        for compiled in launches:
            shape = "channels last" if layout == torch.channels_last else "contiguous"
            yield compiled._replace(dtype=dtype, shape=shape)
