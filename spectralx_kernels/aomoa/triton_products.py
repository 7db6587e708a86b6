"""Triton kernels of AoMoA's forward before the mixture: folded weights, the down product, norms.

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
def _moments(
    x, statistics, tokens, tile, eps, attributes: tl.constexpr, width: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of BM rows of x [T A, width]; the variance is of what is left by the
    mean of a row's first block."""
    row = tile.to(tl.int64) * BM + tl.arange(0, BM)
    here = row < tokens * attributes
    k = tl.arange(0, BW)
    origin = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, BW], tl.float32)
    squares = tl.zeros([BM, BW], tl.float32)
    for k0 in range(0, width, BW):
        full = here[:, None] & ((k0 + k) < width)[None, :]
        value = tl.load(x + row[:, None] * width + (k0 + k)[None, :], full, 0.0).to(tl.float32)
        if k0 == 0:
            origin = tl.sum(value, 1) / tl.minimum(width, BW)
        value = tl.where(full, value - origin[:, None], 0.0)
        sums += value
        squares += value * value
    distance = tl.sum(sums, 1) / width
    variance = tl.sum(squares, 1) / width - distance * distance
    rstd = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + eps)
    at = statistics + row % attributes * tokens + row // attributes
    tl.store(at, origin + distance, here)
    tl.store(at + (tokens * attributes).to(tl.int64), rstd, here)


@triton.jit(do_not_specialize=["tokens", "right_programs"])
def prepare(
    gamma, beta, down, up, scaler, frozen, bias, folded, column_sums, shift, right, counter,
    x, statistics, tokens, right_programs, eps,
    width: tl.constexpr, rank: tl.constexpr, out: tl.constexpr, attributes: tl.constexpr,
    ONES: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A program to a row of `down`: gamma folded in, its sum after rounding, beta down^T. The
    programs after them fold `scaler` into `up`: right [A, out, r], or, with `frozen`, beside its
    rows: [A, out, K] of [up | W | bias, 0 ...] for the first attribute and [W | bias, 0 ... | up]
    for the second, where the bias has ONES columns. With `x` the programs after these put norm1's
    mean and 1 / deviation of its rows into statistics [3, A, T]. `counter` is set to 0."""
    pid = tl.program_id(0)
    if counter is not None:  # noqa: SIM102 (decided when compiling, the inner one is not)
        if pid == 0:
            tl.store(counter, 0)
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
    elif pid >= rank + right_programs:
        if x is not None:
            _moments(
                x, statistics, tokens, pid - rank - right_programs, eps, attributes, width, BM, BW
            )
    else:
        at = (pid - rank) * BLOCK + tl.arange(0, BLOCK)
        columns: tl.constexpr = rank if frozen is None else rank + attributes * width + ONES
        row = at // columns
        inside = row < out * attributes
        place = at % columns
        if frozen is not None:
            # Of both attributes: the rank, the frozen layer's columns, the bias's.
            place = tl.where(row < out, place, (place + rank) % columns)
        of_up = inside & (place < rank)
        scale = tl.load(scaler + row, of_up, 0.0).to(tl.float32)
        value = tl.load(up + (row % out) * rank + place, of_up, 0.0).to(tl.float32)
        value = (scale * value).to(right.dtype.element_ty)
        if frozen is not None:
            k = place - rank
            of_frozen = inside & (k >= 0) & (k < attributes * width)
            value += tl.load(frozen + row * (attributes * width) + k, of_frozen, 0.0)
            if bias is not None:
                value += tl.load(bias + row, inside & (k == attributes * width), 0.0)
        tl.store(right + at, value, inside)


@triton.jit
def down_product(
    x, folded, copy, copy_at, row, here, n, width: tl.constexpr, rank: tl.constexpr, eps,
    SHIFTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x folded^T [BM, BN] at columns n, the mean of each row's first block, and norm1's mean and
    1 / deviation [BM] from the same pass over x.

    The variance is of x less the mean of the row's first block, so that a large mean does not
    cancel; SHIFTED takes that off before the product too. With `copy` rows go to copy + copy_at.
    """
    k = tl.arange(0, BK)
    first = tl.load(
        x + row[:, None] * width + k[None, :], here[:, None] & (k < width)[None, :], 0.0
    )
    origin = tl.sum(first.to(tl.float32), 1) / tl.minimum(width, BK)
    acc = tl.zeros([BM, BN], tl.float32)
    sums = tl.zeros([BM, BK], tl.float32)
    squares = tl.zeros([BM, BK], tl.float32)
    for k0 in range(0, width, BK):
        inside = (k0 + k) < width
        full = here[:, None] & inside[None, :]
        at = x + row[:, None] * width + (k0 + k)[None, :]
        values = tl.load(at, full, 0.0)
        # For the moments from the cache again, which another policy keeps from being one load
        # with the product's: shared by both, it is overwritten while the product reads it
        # (_triton_races.py).
        apart = tl.load(at, full, 0.0, eviction_policy="evict_last")
        weight = tl.load(
            folded + n[None, :] * width + (k0 + k)[:, None],
            inside[:, None] & (n < rank)[None, :],
            0.0,
        )
        if copy is not None:
            tl.store(copy + copy_at + (k0 + k)[None, :], apart, full)
        moved = tl.where(full, apart.to(tl.float32) - origin[:, None], 0.0)
        sums += moved
        squares += moved * moved
        if SHIFTED:
            values = moved.to(x.dtype.element_ty)
        acc = tl.dot(values, weight, acc, input_precision="ieee")
    distance = tl.sum(sums, 1) / width
    variance = tl.sum(squares, 1) / width - distance * distance
    rstd = tl.rsqrt(tl.where(variance < 0, 0.0, variance) + eps)
    return acc, origin, origin + distance, rstd


@triton.jit(do_not_specialize=["tokens"])
def down_norm(
    x, folded, column_sums, shift, statistics, normed,
    tokens, attributes: tl.constexpr, width: tl.constexpr, rank: tl.constexpr, eps,
    SHIFTED: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x folded^T with norm1's statistics from the same pass over x, and norm2. WHOLE: a tile holds
    the whole rank."""
    a = tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < tokens
    row = t.to(tl.int64) * attributes + a
    mean = tl.zeros([BM], tl.float32)
    rstd = tl.zeros([BM], tl.float32)
    for n0 in range(0, rank, BN):
        n = n0 + tl.arange(0, BN)
        acc, origin, mean, rstd = down_product(
            x, folded, None, 0, row, here, n, width, rank, eps, SHIFTED, BM, BN, BK
        )
        known = n < rank
        sum_n = tl.load(column_sums + n, known, 0.0)
        shift_n = tl.load(shift + n, known, 0.0)
        off = mean - origin if SHIFTED else mean
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
