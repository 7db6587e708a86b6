"""Triton kernels of AoMoA's forward before and after the mixture: products and what is fused in.

Programs take tiles of tokens of one attribute: row = token * attributes + attribute. Where a
program reads what it wrote to global memory itself, a barrier stands between; no program reads
what another of the same launch writes. Sizes of weights are compiled in, the number of tokens is
not.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prepare(
    gamma, beta, down, up, scaler, folded, column_sums, shift, scaled_up,
    width: tl.constexpr, rank: tl.constexpr, out: tl.constexpr, attributes: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program to a row of `down`: gamma folded in, its sum after rounding, beta down^T. With
    SCALE the programs after them fold `scaler` into `up`: [A, out, r]."""
    pid = tl.program_id(0)
    if pid < rank:
        sums = tl.zeros([BLOCK], tl.float32)
        moved = tl.zeros([BLOCK], tl.float32)
        for k0 in range(0, width, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            at = pid * width + k
            weight = tl.load(down + at, k < width, 0.0).to(tl.float32)
            scale = tl.load(gamma + k, k < width, 0.0).to(tl.float32)
            product = (scale * weight).to(folded.dtype.element_ty)
            tl.store(folded + at, product, k < width)
            sums += product.to(tl.float32)
            moved += tl.load(beta + k, k < width, 0.0).to(tl.float32) * weight
        tl.store(column_sums + pid, tl.sum(sums, 0))
        tl.store(shift + pid, tl.sum(moved, 0))
    elif SCALE:
        at = (pid - rank) * BLOCK + tl.arange(0, BLOCK)
        plane = out * rank
        inside = at < plane * attributes
        scale = tl.load(scaler + at // rank, inside, 0.0).to(tl.float32)
        value = tl.load(up + at % plane, inside, 0.0).to(tl.float32)
        tl.store(scaled_up + at, (scale * value).to(scaled_up.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens"])
def down_norm(
    x, folded, column_sums, shift, statistics, normed,
    tokens, attributes: tl.constexpr, width: tl.constexpr, rank: tl.constexpr, eps,
    SHIFTED: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x folded^T with norm1's statistics from the same pass over x, and norm2.

    The variance is of x less the mean of the row's first block, so that a large mean does not
    cancel; SHIFTED takes that off before the product too. WHOLE: a tile holds the whole rank.
    """
    a = tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < tokens
    row = t.to(tl.int64) * attributes + a
    k = tl.arange(0, BK)
    first = tl.load(
        x + row[:, None] * width + k[None, :], here[:, None] & (k < width)[None, :], 0.0
    )
    origin = tl.sum(first.to(tl.float32), 1) / tl.minimum(width, BK)
    mean = origin
    rstd = origin
    for n0 in range(0, rank, BN):
        n = n0 + tl.arange(0, BN)
        acc = tl.zeros([BM, BN], tl.float32)
        sums = tl.zeros([BM, BK], tl.float32)
        squares = tl.zeros([BM, BK], tl.float32)
        for k0 in range(0, width, BK):
            inside = (k0 + k) < width
            full = here[:, None] & inside[None, :]
            values = tl.load(x + row[:, None] * width + (k0 + k)[None, :], full, 0.0)
            weight = tl.load(
                folded + n[None, :] * width + (k0 + k)[:, None],
                inside[:, None] & (n < rank)[None, :],
                0.0,
            )
            moved = tl.where(full, values.to(tl.float32) - origin[:, None], 0.0)
            sums += moved
            squares += moved * moved
            if SHIFTED:
                values = moved.to(x.dtype.element_ty)
            acc = tl.dot(values, weight, acc, input_precision="ieee")
        distance = tl.sum(sums, 1) / width
        variance = tl.sum(squares, 1) / width - distance * distance
        rstd = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + eps)
        mean = origin + distance
        known = n < rank
        sum_n = tl.load(column_sums + n, known, 0.0)
        shift_n = tl.load(shift + n, known, 0.0)
        off = distance if SHIFTED else mean
        z0 = rstd[:, None] * (acc - off[:, None] * sum_n[None, :]) + shift_n[None, :]
        if WHOLE:
            mean2 = tl.sum(tl.where(known[None, :], z0, 0.0), 1) / rank
            z0 = tl.where(known[None, :], z0 - mean2[:, None], 0.0)
            rstd2 = tl.rsqrt(tl.sum(z0 * z0, 1) / rank + eps)
            z0 = z0 * rstd2[:, None]
            tl.store(statistics + (2 * attributes + a).to(tl.int64) * tokens + t, rstd2, here)
        tl.store(normed + row[:, None] * rank + n[None, :], z0, here[:, None] & known[None, :])
    tl.store(statistics + a.to(tl.int64) * tokens + t, mean, here)
    tl.store(statistics + (attributes + a).to(tl.int64) * tokens + t, rstd, here)
    if not WHOLE:
        _norm_in_place(statistics, normed, tokens, attributes, rank, eps, a, t, row, BM, BN)


@triton.jit
def _norm_in_place(
    statistics, normed, tokens, attributes: tl.constexpr, rank: tl.constexpr, eps, a, t, row,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """norm2 of rows that this program has just written, chunk after chunk."""
    here = t < tokens
    tl.debug_barrier()
    sums = tl.zeros([BM, BN], tl.float32)
    for n0 in range(0, rank, BN):
        n = n0 + tl.arange(0, BN)
        full = here[:, None] & (n < rank)[None, :]
        sums += tl.load(normed + row[:, None] * rank + n[None, :], full, 0.0)
    mean = tl.sum(sums, 1) / rank
    squares = tl.zeros([BM, BN], tl.float32)
    for n0 in range(0, rank, BN):
        n = n0 + tl.arange(0, BN)
        full = here[:, None] & (n < rank)[None, :]
        value = tl.load(normed + row[:, None] * rank + n[None, :], full, 0.0)
        value = tl.where(full, value - mean[:, None], 0.0)
        squares += value * value
    rstd = tl.rsqrt(tl.sum(squares, 1) / rank + eps)
    tl.debug_barrier()
    for n0 in range(0, rank, BN):
        n = n0 + tl.arange(0, BN)
        full = here[:, None] & (n < rank)[None, :]
        at = normed + row[:, None] * rank + n[None, :]
        tl.store(at, (tl.load(at, full, 0.0) - mean[:, None]) * rstd[:, None], full)
    tl.store(statistics + (2 * attributes + a).to(tl.int64) * tokens + t, rstd, here)


@triton.jit
def _sum_load(load_partial, load, tiles, slots: tl.constexpr):
    for s0 in range(0, slots, 64):
        s = s0 + tl.arange(0, 64)
        sums = tl.zeros([64, 64], tl.float32)
        i = tl.arange(0, 64)
        while tl.max(tiles - i, 0) > 0:
            inside = (i < tiles)[:, None] & (s < slots)[None, :]
            sums += tl.load(load_partial + i[:, None] * slots + s[None, :], inside, 0.0)
            i += 64
        tl.store(load + s, tl.sum(sums, 0), s < slots)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def output(
    x, weight, bias, mixed, up, scaler, out, load_partial, load,
    tokens, tiles,
    attributes: tl.constexpr, width: tl.constexpr, out_width: tl.constexpr, rank: tl.constexpr,
    experts: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """scaler (mixed up^T) + x W^T + bias in one accumulator; the first program adds the loads up.

    width: in; out_width: out / A. A tile of columns lies within one attribute.
    """
    pid = tl.program_id(0)
    if pid == 0:
        _sum_load(load_partial, load, tiles, attributes * experts)
    else:
        pid -= 1
        per_attribute = tl.cdiv(out_width, BN)
        columns = per_attribute * attributes
        height = tl.cdiv(tokens, BM)
        band = pid // (GROUP * columns)
        rows_here = tl.minimum(height - band * GROUP, GROUP)
        tile_m = band * GROUP + pid % (GROUP * columns) % rows_here
        tile_n = pid % (GROUP * columns) // rows_here
        a = tile_n // per_attribute
        t = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
        n = tile_n % per_attribute * BN + tl.arange(0, BN)
        here = t < tokens
        known = n < out_width
        o = a * out_width + n
        k = tl.arange(0, BK)
        acc = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, rank, BK):
            inside = (k0 + k) < rank
            left = tl.load(
                mixed + (t[:, None] * attributes + a) * rank + (k0 + k)[None, :],
                here[:, None] & inside[None, :],
                0.0,
            )
            right = tl.load(
                up + n[None, :] * rank + (k0 + k)[:, None],
                inside[:, None] & known[None, :],
                0.0,
            )
            acc = tl.dot(left, right, acc, input_precision="ieee")
        acc *= tl.load(scaler + o, known, 0.0).to(tl.float32)[None, :]
        for k0 in range(0, width, BK):
            inside = (k0 + k) < width
            left = tl.load(
                x + t[:, None] * width + (k0 + k)[None, :], here[:, None] & inside[None, :], 0.0
            )
            right = tl.load(
                weight + o[None, :] * width + (k0 + k)[:, None],
                inside[:, None] & known[None, :],
                0.0,
            )
            acc = tl.dot(left, right, acc, input_precision="ieee")
        if bias is not None:
            acc += tl.load(bias + o, known, 0.0).to(tl.float32)[None, :]
        tl.store(
            out + t[:, None] * (out_width * attributes) + o[None, :],
            acc.to(out.dtype.element_ty),
            here[:, None] & known[None, :],
        )
