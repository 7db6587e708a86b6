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
def _scores(
    z, weights, a, c, known, rank: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """z weights_a [BM, EP], weights [A, r, E], in float32: rounded z would give tokens to other
    experts than float32 does."""
    found = tl.zeros([BM, EP], tl.float32)
    for e in tl.static_range(EXPERTS):
        weight = tl.load(weights + (a * rank + c) * EXPERTS + e, known, 0.0).to(tl.float32)
        score = tl.sum(z * weight[None, :], 1)
        found = tl.where(tl.arange(0, EP)[None, :] == e, score[:, None], found)
    return found


@triton.jit
def _gated(
    acc, off, rstd, column_sums, shift, gamma, beta, gate, gate_noise, noise,
    statistics, normed, gates, load_partial, tokens, a, row, place, here, eps,
    attributes: tl.constexpr, rank: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    NOISY: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """z [BM, BR] rounded and gates [BM, EP] from the down product `acc` of rows whose mean is `off`
    off; to memory normed, norm2's statistic, gates and the tile's load."""
    c = tl.arange(0, BR)
    known = c < rank
    full = here[:, None] & known[None, :]
    z0 = rstd[:, None] * (acc - off[:, None] * tl.load(column_sums + c, known, 0.0)[None, :])
    z0 += tl.load(shift + c, known, 0.0)[None, :]
    mean2 = tl.sum(tl.where(known[None, :], z0, 0.0), 1) / rank
    z0 = tl.where(known[None, :], z0 - mean2[:, None], 0.0)
    rstd2 = tl.rsqrt(tl.sum(z0 * z0, 1) / rank + eps)
    n2 = z0 * rstd2[:, None]
    tl.store(normed + row[:, None] * rank + c[None, :], n2, full)
    tl.store(statistics + 2 * (tokens * attributes).to(tl.int64) + place, rstd2, here)
    scale = tl.load(gamma + c, known, 0.0).to(tl.float32)
    offset = tl.load(beta + c, known, 0.0).to(tl.float32)
    z = tl.where(full, n2 * scale[None, :] + offset[None, :], 0.0)
    clean = _scores(z, gate, a, c, known, rank, EXPERTS, BM, EP)
    raw = tl.zeros([BM, EP], tl.float32)
    if NOISY:
        raw = _scores(z, gate_noise, a, c, known, rank, EXPERTS, BM, EP)
    weight = give_gates(
        clean, raw, noise, gates, load_partial, a, place, here, attributes, EXPERTS, TOP_K, NOISY,
        BM, EP,
    )  # fmt: skip
    return z.to(gate.dtype.element_ty), weight


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
    """Output [BM, BR] of expert e from its hidden layer `values` [BM, BH]."""
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
    to_row = t.to(tl.int64)[:, None] * ROW
    acc, origin, mean, rstd = down_product(
        x, folded, beside, to_row + a * width, row, here, c, width, rank, eps, SHIFTED, BM, BR, BK
    )
    tl.store(statistics + place, mean, here)
    tl.store(statistics + (tokens * attributes).to(tl.int64) + place, rstd, here)
    if beside is not None:  # noqa: SIM102 (decided when compiling, the inner one is not)
        if a == 0:
            one = tl.arange(0, ONES)
            value = tl.where(one == 0, 1.0, 0.0).to(beside.dtype.element_ty)
            at = beside + to_row + attributes * width + one[None, :]
            tl.store(at, tl.broadcast_to(value[None, :], [BM, ONES]), here[:, None])
    high, weight = _gated(
        acc, mean - origin if SHIFTED else mean, rstd, column_sums, shift, gamma, beta, gate,
        gate_noise, noise, statistics, normed, gates, load_partial, tokens, a, row, place, here,
        eps, attributes, rank, EXPERTS, TOP_K, NOISY, BM, BR, EP,
    )  # fmt: skip
    n = tl.arange(0, BH)
    peak = tl.full([BM, BR], float("-inf"), tl.float32)
    total = tl.zeros([BM, BR], tl.float32)
    for e in tl.static_range(EXPERTS):
        values = hidden_of(high, fc1, fc1_bias, e, n, c, rank, hidden, BM)
        y = output_of(values, fc2, fc2_bias, e, n, c, rank, hidden)
        share = pick(weight, tl.full([BM], e, tl.int32), EP)
        peak, total = add_term(peak, total, y, share, share != 0)
    total = log_sum(peak, total).to(mixed.dtype.element_ty)
    tl.store(mixed + to_row + a * STEP + c[None, :], total, here[:, None] & (c < rank)[None, :])
    finish_load(load_partial, load, counter, attributes * EXPERTS)


@triton.jit(do_not_specialize=["tokens"])
def adapt_product(
    product, column_sums, shift, gamma, beta, gate, gate_noise, noise,
    fc1, fc1_bias, fc2, fc2_bias,
    statistics, normed, gates, load_partial, load, counter, rounded, hidden_rows, mixed,
    tokens, attributes: tl.constexpr, rank: tl.constexpr, hidden: tl.constexpr, eps,
    CENTRED: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    BY: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """`adapt` behind the down product [R, r] of the vendor, of rows that are CENTRED or not, and
    norm1's statistics; mixed [T, A, r].

    A long rank's left operands go through memory, rounded [R, r] and hidden_rows [R, E h]: as
    registers every warp would hold them whole.
    """
    a = tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < tokens
    row = t.to(tl.int64) * attributes + a
    place = a.to(tl.int64) * tokens + t
    c = tl.arange(0, BR)
    known = c < rank
    full = here[:, None] & known[None, :]
    to = row[:, None] * rank + c[None, :]
    acc = tl.load(product + to, full, 0.0)
    mean = tl.load(statistics + place, here, 0.0)
    rstd = tl.load(statistics + (tokens * attributes).to(tl.int64) + place, here, 0.0)
    high, weight = _gated(
        acc, tl.zeros([BM], tl.float32) if CENTRED else mean, rstd, column_sums, shift, gamma, beta,
        gate, gate_noise, noise, statistics, normed, gates, load_partial, tokens, a, row, place,
        here, eps, attributes, rank, EXPERTS, TOP_K, NOISY, BM, BR, EP,
    )  # fmt: skip
    tl.store(rounded + to, high, full)
    tl.debug_barrier()

    columns: tl.constexpr = EXPERTS * hidden
    for n0 in tl.static_range(0, columns, BN):
        n = n0 + tl.arange(0, BN)
        inside = n < columns
        hidden_acc = tl.zeros([BM, BN], tl.float32)
        for k0 in range(0, rank, BC):
            k = k0 + tl.arange(0, BC)
            left = tl.load(
                rounded + row[:, None] * rank + k[None, :], here[:, None] & (k < rank)[None, :], 0.0
            )
            right = tl.load(
                fc1 + n[None, :] * rank + k[:, None], (k < rank)[:, None] & inside[None, :], 0.0
            )
            hidden_acc = tl.dot(left, right, hidden_acc, input_precision="ieee")
        hidden_acc += tl.load(fc1_bias + n, inside, 0.0).to(tl.float32)[None, :]
        hidden_acc = tl.where(hidden_acc < 0, 0.0, hidden_acc)  # NaN stays
        tl.store(
            hidden_rows + row[:, None] * columns + n[None, :],
            hidden_acc.to(hidden_rows.dtype.element_ty),
            here[:, None] & inside[None, :],
        )
    tl.debug_barrier()

    n = tl.arange(0, BH)
    for c0 in range(0, rank, BY):
        y_c = c0 + tl.arange(0, BY)
        peak = tl.full([BM, BY], float("-inf"), tl.float32)
        total = tl.zeros([BM, BY], tl.float32)
        for e in tl.static_range(EXPERTS):
            values = tl.load(
                hidden_rows + row[:, None] * columns + e * hidden + n[None, :],
                here[:, None] & (n < hidden)[None, :],
                0.0,
            )
            y = output_of(values, fc2, fc2_bias, e, n, y_c, rank, hidden)
            share = pick(weight, tl.full([BM], e, tl.int32), EP)
            peak, total = add_term(peak, total, y, share, share != 0)
        tl.store(
            mixed + row[:, None] * rank + y_c[None, :],
            log_sum(peak, total).to(mixed.dtype.element_ty),
            here[:, None] & (y_c < rank)[None, :],
        )
    finish_load(load_partial, load, counter, attributes * EXPERTS)
