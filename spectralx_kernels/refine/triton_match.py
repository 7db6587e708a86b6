"""Triton kernels of `match_argmax`: sums over keys, then the comparison over queries.

A tile of scores is [BM queries, BN keys]; none is written to memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

_NONE = tl.constexpr(2**31 - 1)  # past every query


@triton.jit
def _scores(queries, keys, q, k, rows, count, scale,
            D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """scale times queries [q] times keys [k] of one image, zeros past their ends."""
    acc = tl.zeros([BM, BN], tl.float32)
    q_at = queries + (q.to(tl.int64) * D)[:, None]
    k_at = keys + (k.to(tl.int64) * D)[None, :]
    for d0 in range(0, D, BK):
        d = d0 + tl.arange(0, BK)
        left = tl.load(q_at + d[None, :], (q < rows)[:, None] & (d < D)[None, :], 0.0)
        right = tl.load(k_at + d[:, None], (d < D)[:, None] & (k < count)[None, :], 0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc * scale


@triton.jit
def _base(largest):
    """What is taken off before an exponential: 0 for an infinity."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit
def _moved(total, largest, base):
    """A sum of exponentials under `largest`, under `base` instead."""
    lowest = largest == float("-inf")
    return total * tl.exp(tl.where(lowest, float("-inf"), _base(largest)) - base)


@triton.jit(do_not_specialize=["rows", "count", "span"])
def sum_keys(
    queries, keys, peaks, totals, rows, count, span, scale,
    D: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of BM queries and `span` keys the largest score and the sum of exponentials under it, both
    [B, SPLITS, rows]; a NaN is in the sum."""
    tiles = tl.cdiv(rows, BM)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    q = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    queries += image * rows * D
    keys += image * count * D
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    k0 = split * span
    last = tl.minimum(count, k0 + span)
    while k0 < last:
        k = k0 + tl.arange(0, BN)
        here = (k < last)[None, :]
        scores = _scores(queries, keys, q, k, rows, count, scale, D, BM, BN, BK)
        known = tl.where(here & (scores == scores), scores, float("-inf"))
        larger = tl.maximum(peak, tl.max(known, 1))
        base = _base(larger)
        added = tl.where(here, tl.exp(scores - base[:, None]), 0.0)
        total = _moved(total, peak, base) + tl.sum(added, 1)
        peak = larger
        k0 += BN
    at = (image * SPLITS + split) * rows + q
    tl.store(peaks + at, peak, q < rows)
    tl.store(totals + at, total, q < rows)


@triton.jit(do_not_specialize=["rows", "count"])
def choose(
    queries, keys, peaks, totals, match, rows, count, scale,
    D: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of BN keys the query with the largest score less the logarithm of its sum: [B, count]. The
    lowest of equal ones, the first NaN if there is one."""
    tiles = tl.cdiv(count, BN)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    k = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    queries += image * rows * D
    keys += image * count * D
    best = tl.full([BN], float("-inf"), tl.float32)
    index = tl.zeros([BN], tl.int32)
    nan = tl.full([BN], _NONE, tl.int32)
    q0 = 0
    while q0 < rows:
        q = q0 + tl.arange(0, BM)
        known = q < rows
        scores = _scores(queries, keys, q, k, rows, count, scale, D, BM, BN, BK)
        at = image * SPLITS * rows + q
        peak = tl.full([BM], float("-inf"), tl.float32)
        for split in range(SPLITS):
            peak = tl.maximum(peak, tl.load(peaks + at + split * rows, known, float("-inf")))
        base = _base(peak)
        total = tl.zeros([BM], tl.float32)
        for split in range(SPLITS):
            part = tl.load(totals + at + split * rows, known, 0.0)
            total += _moved(part, tl.load(peaks + at + split * rows, known, float("-inf")), base)
        total = tl.where(known, total, 1.0)
        log_sum = tl.where(
            (total == total) & (tl.abs(peak) == float("inf")), peak, peak + tl.log(total)
        )
        value = scores - log_sum[:, None]
        wrong = (value != value) & known[:, None]
        numbered = tl.broadcast_to(q[:, None], [BM, BN])
        nan = tl.minimum(nan, tl.min(tl.where(wrong, numbered, _NONE), 0))
        value = tl.where((value == value) & known[:, None], value, float("-inf"))
        top = tl.max(value, 0)
        first = tl.min(tl.where(value == top[None, :], numbered, _NONE), 0)
        index = tl.where(top > best, first, index)
        best = tl.maximum(best, top)
        q0 += BM
    found = tl.where(nan < _NONE, nan, index)
    tl.store(match + image * count + k, found.to(tl.int64), k < count)
