"""Triton kernel of AoMoA's forward where a tile holds the whole rank: from x to the experts' sum.

Nothing between the down product and the log-sum-exp leaves the program but what backward keeps.
Tiles and rows as in ``triton_products.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.aomoa.triton_mixture import (
    add_term,
    finish_load,
    give_gates,
    log_sum,
    pick,
)
from spectralx_kernels.aomoa.triton_products import down_product


@triton.jit
def scores(
    z, high, gate, gate_noise, a, c, rank: tl.constexpr, EXPERTS: tl.constexpr,
    NOISY: tl.constexpr, BM: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Clean logits and raw deviations [BM, EP] of z [BM, BR], which is `high` where rounded: what
    that leaves goes in too, as in ``triton_mixture.score``."""
    e = tl.arange(0, EP)
    at = (a * rank + c)[:, None] * EXPERTS + e[None, :]
    known = (c < rank)[:, None] & (e < EXPERTS)[None, :]
    low = (z - high.to(tl.float32)).to(gate.dtype.element_ty)
    narrow: tl.constexpr = gate.dtype.element_ty != tl.float32
    weight = tl.load(gate + at, known, 0.0)
    clean = tl.dot(high, weight, input_precision="ieee")
    if narrow:
        clean = tl.dot(low, weight, clean)
    raw = tl.zeros([BM, EP], tl.float32)
    if NOISY:
        weight = tl.load(gate_noise + at, known, 0.0)
        raw = tl.dot(high, weight, raw, input_precision="ieee")
        if narrow:
            raw = tl.dot(low, weight, raw)
    return clean, raw


@triton.jit
def hidden_of(
    high, fc1, fc1_bias, e, n, c, rank: tl.constexpr, hidden: tl.constexpr, BM: tl.constexpr
):
    """Hidden layer [BM, BH] of expert e, rounded."""
    inside = n < hidden
    at = (e * hidden + n)[None, :] * rank + c[:, None]
    weight = tl.load(fc1 + at, (c < rank)[:, None] & inside[None, :], 0.0)
    acc = tl.dot(high, weight, input_precision="ieee")
    acc += tl.load(fc1_bias + e * hidden + n, inside, 0.0).to(tl.float32)[None, :]
    return tl.where(acc < 0, 0.0, acc).to(fc1.dtype.element_ty)  # NaN stays


@triton.jit
def output_of(values, fc2, fc2_bias, e, n, c, rank: tl.constexpr, hidden: tl.constexpr):
    """Output [BM, BR] of expert e from its hidden layer."""
    known = c < rank
    at = (e * rank + c)[None, :] * hidden + n[:, None]
    weight = tl.load(fc2 + at, (n < hidden)[:, None] & known[None, :], 0.0)
    acc = tl.dot(values, weight, input_precision="ieee")
    return acc + tl.load(fc2_bias + e * rank + c, known, 0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["tokens"])
def adapt(
    x, folded, column_sums, shift, gamma, beta, gate, gate_noise, noise,
    fc1, fc1_bias, fc2, fc2_bias,
    statistics, normed, gates, load_partial, load, counter, mixed, beside,
    tokens, attributes: tl.constexpr, width: tl.constexpr, rank: tl.constexpr,
    hidden: tl.constexpr, eps, ROW: tl.constexpr, STEP: tl.constexpr, ONES: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr, SHIFTED: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """`down_norm` and `mixture` in one: statistics, normed, gates, load, and the log-sum-exp at
    mixed + token ROW + attribute STEP.

    With `beside` x is copied to beside + token ROW, and behind it ONES columns follow of which the
    first is 1, the others 0: what ``triton.py`` multiplies with the frozen weight, its bias and up.
    """
    a = tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < tokens
    row = t.to(tl.int64) * attributes + a
    place = a.to(tl.int64) * tokens + t
    c = tl.arange(0, BR)
    known = c < rank
    full = here[:, None] & known[None, :]
    to_row = t.to(tl.int64)[:, None] * ROW

    acc, origin, mean, rstd = down_product(
        x, folded, beside, to_row + a * width, row, here, c, width, rank, eps, SHIFTED, BM, BR, BK
    )
    off = mean - origin if SHIFTED else mean
    sum_c = tl.load(column_sums + c, known, 0.0)
    z0 = rstd[:, None] * (acc - off[:, None] * sum_c[None, :])
    z0 += tl.load(shift + c, known, 0.0)[None, :]
    mean2 = tl.sum(tl.where(known[None, :], z0, 0.0), 1) / rank
    z0 = tl.where(known[None, :], z0 - mean2[:, None], 0.0)
    rstd2 = tl.rsqrt(tl.sum(z0 * z0, 1) / rank + eps)
    n2 = z0 * rstd2[:, None]
    tl.store(normed + row[:, None] * rank + c[None, :], n2, full)
    plane = (tokens * attributes).to(tl.int64)
    tl.store(statistics + place, mean, here)
    tl.store(statistics + plane + place, rstd, here)
    tl.store(statistics + 2 * plane + place, rstd2, here)
    if beside is not None:  # noqa: SIM102 (decided when compiling, the inner one is not)
        if a == 0:
            one = tl.arange(0, ONES)
            value = tl.where(one == 0, 1.0, 0.0).to(beside.dtype.element_ty)
            at = beside + to_row + attributes * width + one[None, :]
            tl.store(at, tl.broadcast_to(value[None, :], [BM, ONES]), here[:, None])

    scale = tl.load(gamma + c, known, 0.0).to(tl.float32)
    offset = tl.load(beta + c, known, 0.0).to(tl.float32)
    z = tl.where(full, n2 * scale[None, :] + offset[None, :], 0.0)
    high = z.to(gate.dtype.element_ty)
    clean, raw = scores(z, high, gate, gate_noise, a, c, rank, EXPERTS, NOISY, BM, EP)
    weight = give_gates(
        clean, raw, noise, gates, load_partial, a, place, here, attributes, EXPERTS, TOP_K, NOISY,
        BM, EP,
    )  # fmt: skip
    n = tl.arange(0, BH)
    peak = tl.full([BM, BR], float("-inf"), tl.float32)
    total = tl.zeros([BM, BR], tl.float32)
    for e in tl.static_range(EXPERTS):
        values = hidden_of(high, fc1, fc1_bias, e, n, c, rank, hidden, BM)
        y = output_of(values, fc2, fc2_bias, e, n, c, rank, hidden)
        peak, total = add_term(peak, total, y, pick(weight, tl.full([BM], e, tl.int32), EP))
    total = log_sum(peak, total)
    tl.store(mixed + to_row + a * STEP + c[None, :], total.to(mixed.dtype.element_ty), full)
    finish_load(load_partial, load, counter, attributes * EXPERTS)
