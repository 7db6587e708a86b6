"""Triton functions of AoMoA's backward where every expert runs on every row of a tile.

What the experts of a tile need stays in registers, in tuples by expert: nothing that a program
writes is read back by it. Tiles and rows as in ``triton_products.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.aomoa.triton_mixture import _LOG_EPSILON, gate_of, z_chunk


@triton.jit
def hidden_layers(
    normed, gamma, beta, fc1, fc1_bias, hidden_rows, row, here,
    rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BZ: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The hidden layers [BM, BH] of all experts, rounded, which also go to hidden_rows."""
    n = tl.arange(0, BH)
    inside = n < hidden
    sums = ()
    for _ in tl.static_range(EXPERTS):
        sums = sums + (tl.zeros([BM, BH], tl.float32),)  # noqa: RUF005
    for c0 in range(0, rank, BZ):
        c = c0 + tl.arange(0, BZ)
        z = z_chunk(normed, gamma, beta, row, here, c, rank).to(fc1.dtype.element_ty)
        added = ()
        for e in tl.static_range(EXPERTS):
            weight = tl.load(
                fc1 + (e * hidden + n)[None, :] * rank + c[:, None],
                (c < rank)[:, None] & inside[None, :],
                0.0,
            )
            added = added + (tl.dot(z, weight, sums[e], input_precision="ieee"),)  # noqa: RUF005
        sums = added
    values = ()
    for e in tl.static_range(EXPERTS):
        value = sums[e] + tl.load(fc1_bias + e * hidden + n, inside, 0.0).to(tl.float32)[None, :]
        value = tl.where(value < 0, 0.0, value).to(hidden_rows.dtype.element_ty)  # NaN stays
        tl.store(
            hidden_rows + (row[:, None] * EXPERTS + e) * hidden + n[None, :],
            value,
            here[:, None] & inside[None, :],
        )
        values = values + (value,)  # noqa: RUF005
    return values


@triton.jit
def experts_backward(
    values, gates, fc2, fc2_bias, mixed_grad, combined, mixed, hidden_grad, row, place, here,
    rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """From the hidden layers `values` to the log-sum-exp and back: gates times their gradients
    [BM, EP], and the gradients [BM, BH] of all hidden layers, rounded, which also go to
    hidden_grad."""
    n = tl.arange(0, BH)
    inside = n < hidden
    sums = ()
    shares = ()
    for _ in tl.static_range(EXPERTS):
        sums = sums + (tl.zeros([BM, BH], tl.float32),)  # noqa: RUF005
        shares = shares + (tl.zeros([BM], tl.float32),)  # noqa: RUF005
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        known = c < rank
        full = here[:, None] & known[None, :]
        upstream = tl.load(mixed_grad + place[:, None] * rank + c[None, :], full, 0.0)
        weights = ()
        terms = ()
        peak = tl.full([BM, BC], float("-inf"), tl.float32)
        for e in tl.static_range(EXPERTS):
            weight = tl.load(
                fc2 + (e * rank + c)[:, None] * hidden + n[None, :],
                known[:, None] & inside[None, :],
                0.0,
            )
            y = tl.dot(values[e], tl.trans(weight), input_precision="ieee")
            y += tl.load(fc2_bias + e * rank + c, known, 0.0).to(tl.float32)[None, :]
            gate = gate_of(gates, place, here, e, EXPERTS)
            taken = gate != 0
            log_gate = tl.log(tl.where(taken, gate, 1.0))
            term = tl.where(taken[:, None], y + log_gate[:, None], float("-inf"))
            peak = tl.where(term > peak, term, peak)  # a NaN comes in through the total
            weights = weights + (weight,)  # noqa: RUF005
            terms = terms + (term,)  # noqa: RUF005
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.zeros([BM, BC], tl.float32)
        powers = ()
        for e in tl.static_range(EXPERTS):
            power = tl.exp(terms[e] - base)
            total += power
            powers = powers + (power,)  # noqa: RUF005
        none = total == 0
        total = tl.where(none, 1.0, total)
        value = tl.where(none, _LOG_EPSILON, base + tl.log(total))
        to = row[:, None] * rank + c[None, :]
        tl.store(combined + to, value, full)
        tl.store(mixed + to, value.to(mixed.dtype.element_ty), full)
        scaled = upstream.to(tl.float32) / total
        added = ()
        shared = ()
        for e in tl.static_range(EXPERTS):
            taken = gate_of(gates, place, here, e, EXPERTS) != 0
            grad = tl.where(taken[:, None], scaled * powers[e], 0.0)
            shared = shared + (shares[e] + tl.sum(grad, 1),)  # noqa: RUF005
            added = added + (  # noqa: RUF005
                tl.dot(grad.to(weights[e].dtype), weights[e], sums[e], input_precision="ieee"),
            )
        sums = added
        shares = shared
    grads = ()
    by_expert = tl.zeros([BM, EP], tl.float32)
    for e in tl.static_range(EXPERTS):
        by_expert = tl.where(tl.arange(0, EP)[None, :] == e, shares[e][:, None], by_expert)
        grad = tl.where(values[e] <= 0, 0.0, sums[e]).to(hidden_grad.dtype.element_ty)
        tl.store(
            hidden_grad + (row[:, None] * EXPERTS + e) * hidden + n[None, :],
            grad,
            here[:, None] & inside[None, :],
        )
        grads = grads + (grad,)  # noqa: RUF005
    return by_expert, grads


@triton.jit
def through_fc1(
    acc, grads, fc1, c, rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """acc [BM, BC] + the experts' hidden gradients times fc1 at columns c."""
    n = tl.arange(0, BH)
    for e in tl.static_range(EXPERTS):
        weight = tl.load(
            fc1 + (e * hidden + n)[:, None] * rank + c[None, :],
            (n < hidden)[:, None] & (c < rank)[None, :],
            0.0,
        )
        acc = tl.dot(grads[e], weight, acc, input_precision="ieee")
    return acc
