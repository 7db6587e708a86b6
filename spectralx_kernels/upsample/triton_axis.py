"""Triton kernels of bilinear interpolation along one axis, and of its transpose.

Positions are fractions: the coordinate of output i is max(i a + b, 0) / d in the small line, with
integers a, b and d of `Axis`, so no position is rounded and a weight is rounded once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

_AXIS = ["a", "b", "d", "length", "step", "size"]


class Axis(NamedTuple):
    """A line of `length` values resized to `size`, as ``torch.nn.functional.interpolate`` does."""

    a: int
    b: int
    d: int
    length: int
    step: int  # from the first of two sources to the second
    size: int

    @staticmethod
    def of(length: int, size: int, align_corners: bool) -> Axis:
        """Raises ValueError where the integers would not fit in 32 bits."""
        if 2 * (length + 1) * (size + 1) >= 2**31:
            raise ValueError(
                f"size: got {size} from {length}, expected a product below {2**30}: positions are "
                "32-bit integers"
            )
        if length == size:
            return Axis(1, 0, 1, length, 0, size)
        if not align_corners:
            return Axis(2 * length, length - size, 2 * size, length, 1, size)
        if length == 1 or size == 1:  # all in the first
            return Axis(0, 0, size, length, 1, size)
        return Axis(length - 1, 0, size - 1, length, 1, size)


@triton.jit
def place(i, a, b, d, length, step):
    """The two sources of output i and the weight of the second."""
    at = tl.maximum(i * a + b, 0)
    first = at // d
    weight = tl.div_rn((at - first * d).to(tl.float32), d.to(tl.float32))
    return first, tl.minimum(first + step, length - 1), weight


@triton.jit
def begin(source, a, b, d, size):
    """The first output whose first source is `source` or later."""
    over = tl.maximum(a, 1)
    found = (tl.maximum(source * d - b, 0) + over - 1) // over
    return tl.where(source <= 0, 0, tl.minimum(found, size))


@triton.jit
def moments_of_tile(value, inside, count):
    """Mean over the rows of a tile, `count` of them inside, and squared deviations from it."""
    mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
    off = tl.where(inside, value - mean[None, :], 0.0)
    return mean, tl.sum(off * off, 0)


@triton.jit(do_not_specialize=[*_AXIS, "inner_n", "inner", "outs", "pad"])
def interpolate(
    source, bias, addend, out,
    inner_n, inner, outs, pad, a, b, d, length, step, size,
    source_n, source_n2, source_t, source_p, source_m,
    out_n, out_n2, out_p, out_m, addend_n, addend_n2, addend_p, addend_m, parts, counts,
    TAPS: tl.constexpr, RELU: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """out[n, p, m] = sum over taps t of source[n, t] at position p + t - pad, at m; zeros outside.

    Then plus bias[m] and addend[n, p, m], and ReLU. n is two indices, the second below inner_n.
    Where parts are given, what a tile has stored leaves its moments there, see `moments_of_tile`.
    """
    tiles_p, tiles_m = tl.cdiv(outs, BP), tl.cdiv(inner, BM)
    tile = tl.program_id(0) % (tiles_p * tiles_m)
    n = tl.program_id(0) // (tiles_p * tiles_m)
    n1, n2 = (n // inner_n).to(tl.int64), (n % inner_n).to(tl.int64)
    p = (tile // tiles_m) * BP + tl.arange(0, BP)
    m = (tile % tiles_m) * BM + tl.arange(0, BM)
    full = (p < outs)[:, None] & (m < inner)[None, :]
    acc = tl.zeros([BP, BM], tl.float32)
    for t in range(TAPS):
        i = p + t - pad
        inside = full & ((i >= 0) & (i < size))[:, None]
        first, second, weight = place(i, a, b, d, length, step)
        base = source + n1 * source_n + n2 * source_n2 + t * source_t + (m * source_m)[None, :]
        low = tl.load(base + (first.to(tl.int64) * source_p)[:, None], inside, 0.0).to(tl.float32)
        high = tl.load(base + (second.to(tl.int64) * source_p)[:, None], inside, 0.0)
        acc += (1.0 - weight)[:, None] * low + weight[:, None] * high.to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + m, m < inner, 0.0).to(tl.float32)[None, :]
    wide = p.to(tl.int64)
    if addend is not None:
        at = addend + n1 * addend_n + n2 * addend_n2
        at += (wide * addend_p)[:, None] + (m.to(tl.int64) * addend_m)[None, :]
        acc += tl.load(at, full, 0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays
    at = out + n1 * out_n + n2 * out_n2
    at += (wide * out_p)[:, None] + (m.to(tl.int64) * out_m)[None, :]
    stored = acc.to(out.dtype.element_ty)
    tl.store(at, stored, full)
    if parts is not None:
        count = tl.minimum(outs - (tile // tiles_m) * BP, BP).to(tl.float32)
        mean, squares = moments_of_tile(stored.to(tl.float32), full, count)
        row = n.to(tl.int64) * tiles_p + tile // tiles_m
        tl.store(parts + row * 2 * inner + m, mean, m < inner)
        tl.store(parts + (row * 2 + 1) * inner + m, squares, m < inner)
        if tile % tiles_m == 0:
            tl.store(counts + row, count)


@triton.jit(do_not_specialize=[*_AXIS, "inner_n", "inner", "outs", "pad"])
def spread(
    grad, divisor, factor, out,
    inner_n, inner, outs, pad, a, b, d, length, step, size,
    grad_n, grad_n2, grad_p, grad_m, out_n, out_n2, out_t, out_p, out_m,
    TAPS: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The transpose: out[n, t] at source i and m, the weighted sum of the grad[n, p, m] it is in.

    In the order of p. Over `divisor` and times `factor`, one number each, where given.
    """
    tiles_p, tiles_m = tl.cdiv(length, BP), tl.cdiv(inner, BM)
    tile = tl.program_id(0) % (tiles_p * tiles_m)
    rest = tl.program_id(0) // (tiles_p * tiles_m)
    t, n = rest % TAPS, rest // TAPS
    n1, n2 = (n // inner_n).to(tl.int64), (n % inner_n).to(tl.int64)
    i = (tile // tiles_m) * BP + tl.arange(0, BP)
    m = (tile % tiles_m) * BM + tl.arange(0, BM)
    full = (i < length)[:, None] & (m < inner)[None, :]
    # Outputs of the source before and of this one: no other touches it.
    start = begin(i - 1, a, b, d, size)
    count = tl.where(i < length, begin(i + 1, a, b, d, size) - start, 0)
    longest = tl.max(count, 0)
    base = grad + n1 * grad_n + n2 * grad_n2 + (m.to(tl.int64) * grad_m)[None, :]
    acc = tl.zeros([BP, BM], tl.float32)
    k = 0
    while k < longest:
        x = start + k
        first, second, weight = place(x, a, b, d, length, step)
        p = x - t + pad
        share = tl.where(first == i, 1.0 - weight, 0.0) + tl.where(second == i, weight, 0.0)
        touches = (first == i) | (second == i)
        inside = full & ((k < count) & touches & (p >= 0) & (p < outs))[:, None]
        value = tl.load(base + (p.to(tl.int64) * grad_p)[:, None], inside, 0.0).to(tl.float32)
        acc += share[:, None] * value
        k += 1
    if divisor is not None:
        acc = acc / tl.load(divisor)
    if factor is not None:
        acc = acc * tl.load(factor).to(tl.float32)
    at = out + n1 * out_n + n2 * out_n2 + t * out_t
    at += (i.to(tl.int64) * out_p)[:, None] + (m.to(tl.int64) * out_m)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), full)
