"""Triton kernels of AoMoA's backward. Tiles and rows as in ``triton_products.py``.

Nothing of [R, E, r] is stored: the gradient of an expert's output is formed from its hidden rows,
the combination and its gradient wherever it is needed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.aomoa.triton_mixture import (
    _NOISE_FLOOR,
    any_row,
    combine,
    gate_of,
    hidden_layer,
    output_layer,
    pick,
    route,
    score,
    softplus,
)


@triton.jit
def output_grad(
    hidden_rows, fc2, fc2_bias, combined, mixed_grad, e, gate, taken, row, place, c,
    rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Gradient [BM, BC] of expert e's output at columns c; 0 for rows that do not take it.

    row: of [T, A]; place: of [A, T], as mixed_grad has it.
    """
    y = output_layer(
        hidden_rows, fc2, fc2_bias, e, row, taken, c, rank, hidden, EXPERTS, BM, BC, BH
    )
    full = taken[:, None] & (c < rank)[None, :]
    total = tl.load(combined + row[:, None] * rank + c[None, :], full, 0.0)
    grad = tl.load(mixed_grad + place[:, None] * rank + c[None, :], full, 0.0).to(tl.float32)
    log_gate = tl.log(tl.where(taken, gate, 1.0))
    return tl.where(full, grad * tl.exp(y + log_gate[:, None] - total), 0.0)


@triton.jit
def _expert_backward(
    shares, gates, fc2, fc2_bias, combined, mixed_grad, hidden_rows, hidden_grad, e, row, place,
    here, rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Gradient of expert e's hidden layer, to hidden_grad [R, E, h]; its gate times the gate's
    gradient, into `shares` [BM, EP]."""
    gate = gate_of(gates, place, here, e, EXPERTS)
    taken = gate != 0
    for n0 in range(0, hidden, BH):
        n = n0 + tl.arange(0, BH)
        acc = tl.zeros([BM, BH], tl.float32)
        share = tl.zeros([BM], tl.float32)
        for c0 in range(0, rank, BC):
            c = c0 + tl.arange(0, BC)
            grad = output_grad(
                hidden_rows, fc2, fc2_bias, combined, mixed_grad, e, gate, taken, row, place, c,
                rank, hidden, EXPERTS, BM, BC, BH,
            )  # fmt: skip
            share += tl.sum(grad, 1)
            weight_at = (e * rank + c)[:, None] * hidden + n[None, :]
            right = tl.load(fc2 + weight_at, (c < rank)[:, None] & (n < hidden)[None, :], 0.0)
            acc = tl.dot(grad.to(fc2.dtype.element_ty), right, acc, input_precision="ieee")
        shares = tl.where(tl.arange(0, EP)[None, :] == e, share[:, None], shares)
        hidden_at = (row[:, None] * EXPERTS + e) * hidden + n[None, :]
        full = here[:, None] & (n < hidden)[None, :]
        value = tl.load(hidden_rows + hidden_at, full, 0.0)
        acc = tl.where(value <= 0, 0.0, acc)
        tl.store(hidden_grad + hidden_at, acc.to(hidden_grad.dtype.element_ty), full)
    return shares


@triton.jit
def through_fc1_rows(
    acc, hidden_grad, fc1, row, taken, first, columns: tl.constexpr, c,
    rank: tl.constexpr, all_columns: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc [BM, BC] + hidden_grad fc1 at `columns` hidden columns from `first` on, at columns c."""
    for n0 in range(0, columns, BN):
        n = n0 + tl.arange(0, BN)
        known = n < columns
        n += first
        left = tl.load(
            hidden_grad + row[:, None] * all_columns + n[None, :],
            taken[:, None] & known[None, :],
            0.0,
        )
        right = tl.load(
            fc1 + n[:, None] * rank + c[None, :], known[:, None] & (c < rank)[None, :], 0.0
        )
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tokens"])
def mixture_backward(
    gates, normed, statistics, gamma, beta, gate, gate_noise, noise, fc1, fc1_bias, fc2, fc2_bias,
    column_sums, shift, mixed_grad, gates_grad, load_grad,
    hidden_rows, hidden_grad, combined, mixed, router_grad, noise_grad, z_grad, normed_grad,
    row_terms, norm_partial,
    tokens, attributes: tl.constexpr, width: tl.constexpr, rank: tl.constexpr,
    hidden: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr,
    DENSE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """From the gradient of `mixed` back to the down product, routing done again.

    For the weights: hidden_rows and hidden_grad [R, E, h], combined [R, r] (float) and mixed (the
    same, rounded), router_grad [R, 2 E]. For what follows: normed_grad [R, r], row_terms [R, 2],
    norm_partial [tiles, A, 4, r]: sums of norm2's weight's and bias's gradient, of z0's, of
    normed_grad * mean1.
    """
    a = tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < tokens
    row = t.to(tl.int64) * attributes + a
    place = a.to(tl.int64) * tokens + t
    e_all = tl.arange(0, EP)
    known = (e_all < EXPERTS)[None, :]
    full = here[:, None] & known
    at = place[:, None] * EXPERTS + e_all[None, :]

    clean, raw = score(
        normed, gamma, beta, gate, gate_noise, a, row, here, rank, EXPERTS, NOISY, BM, BC, EP
    )
    std = softplus(raw) + _NOISE_FLOOR
    logits = clean
    if NOISY:
        logits = clean + tl.load(noise + at, full, 0.0) * std
    chosen, weight, last, following = route(logits, EXPERTS, TOP_K, BM, EP)
    hidden_layer(
        normed, gamma, beta, fc1, fc1_bias, hidden_rows, gates, row, place, here, rank, hidden,
        EXPERTS, DENSE, BM, BC, BH, BN,
    )  # fmt: skip
    tl.debug_barrier()
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        total = combine(
            hidden_rows, fc2, fc2_bias, gates, row, place, here, c, rank, hidden, EXPERTS, DENSE,
            BM, BC, BH,
        )  # fmt: skip
        to = row[:, None] * rank + c[None, :]
        inside = here[:, None] & (c < rank)[None, :]
        tl.store(combined + to, total, inside)
        tl.store(mixed + to, total.to(mixed.dtype.element_ty), inside)
    tl.debug_barrier()

    shares = tl.zeros([BM, EP], tl.float32)
    if DENSE:
        for e in tl.static_range(EXPERTS):
            shares = _expert_backward(
                shares, gates, fc2, fc2_bias, combined, mixed_grad, hidden_rows, hidden_grad, e,
                row, place, here, rank, hidden, EXPERTS, BM, BC, BH, EP,
            )  # fmt: skip
    else:
        for e in range(EXPERTS):
            if any_row(gate_of(gates, place, here, e, EXPERTS) != 0):
                shares = _expert_backward(
                    shares, gates, fc2, fc2_bias, combined, mixed_grad, hidden_rows, hidden_grad,
                    e, row, place, here, rank, hidden, EXPERTS, BM, BC, BH, EP,
                )  # fmt: skip

    # Router.
    if gates_grad is not None:
        kept = tl.load(gates + at, full, 0.0)
        shares += tl.where(kept != 0, kept * tl.load(gates_grad + at, full, 0.0), 0.0)
    logits_grad = tl.where(chosen, shares - weight * tl.sum(shares, 1)[:, None], 0.0)
    clean_grad = tl.zeros([BM, EP], tl.float32)
    raw_grad = tl.zeros([BM, EP], tl.float32)
    if NOISY:
        if load_grad is not None and TOP_K < EXPERTS:
            high = pick(logits, following, EP)
            low = pick(logits, last, EP)
            u = (clean - tl.where(chosen, high[:, None], low[:, None])) / std
            upstream = tl.load(load_grad + a * EXPERTS + e_all, e_all < EXPERTS, 0.0)
            through = upstream[None, :] * tl.exp(-0.5 * u * u) * 0.3989422804014327 / std
            through = tl.where(known, through, 0.0)
            of_high = tl.sum(tl.where(chosen, through, 0.0), 1)
            of_low = tl.sum(tl.where(chosen, 0.0, through), 1)
            clean_grad = through
            raw_grad = -through * u
            logits_grad -= tl.where(e_all[None, :] == following[:, None], of_high[:, None], 0.0)
            logits_grad -= tl.where(e_all[None, :] == last[:, None], of_low[:, None], 0.0)
        drawn = tl.load(noise + at, full, 0.0)
        raw_grad = (raw_grad + logits_grad * drawn) / (1.0 + tl.exp(-raw))
        if noise_grad is not None:
            tl.store(noise_grad + at, logits_grad * std, full)
    clean_grad = (clean_grad + logits_grad).to(gate.dtype.element_ty)
    raw_grad = raw_grad.to(gate.dtype.element_ty)
    router_at = row[:, None] * (2 * EXPERTS) + e_all[None, :]
    tl.store(router_grad + router_at, clean_grad, full)
    tl.store(router_grad + router_at + EXPERTS, raw_grad, full)
    tl.debug_barrier()

    # z's gradient, and the two sums over a row that norm2's backward takes.
    row_sum = tl.zeros([BM], tl.float32)
    row_slope = tl.zeros([BM], tl.float32)
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        inside = here[:, None] & (c < rank)[None, :]
        gate_at = (a * rank + c)[None, :] * EXPERTS + e_all[:, None]
        gate_known = (c < rank)[None, :] & (e_all < EXPERTS)[:, None]
        z_acc = tl.dot(clean_grad, tl.load(gate + gate_at, gate_known, 0.0), input_precision="ieee")
        if NOISY:
            z_acc = tl.dot(
                raw_grad, tl.load(gate_noise + gate_at, gate_known, 0.0), z_acc,
                input_precision="ieee",
            )  # fmt: skip
        if DENSE:
            z_acc = through_fc1_rows(
                z_acc, hidden_grad, fc1, row, here, 0, EXPERTS * hidden, c, rank,
                EXPERTS * hidden, BN,
            )  # fmt: skip
        else:
            for e in range(EXPERTS):
                taken = gate_of(gates, place, here, e, EXPERTS) != 0
                if any_row(taken):
                    z_acc = through_fc1_rows(
                        z_acc, hidden_grad, fc1, row, taken, e * hidden, hidden, c, rank,
                        EXPERTS * hidden, BH,
                    )  # fmt: skip
        to = row[:, None] * rank + c[None, :]
        tl.store(z_grad + to, z_acc, inside)
        scale = tl.load(gamma + c, c < rank, 0.0).to(tl.float32)
        scaled = tl.where(inside, z_acc * scale[None, :], 0.0)
        row_sum += tl.sum(scaled, 1)
        row_slope += tl.sum(scaled * tl.load(normed + to, inside, 0.0), 1)
    tl.debug_barrier()

    # Through norm2, and what norm1 adds to a row of x's gradient.
    plane = (tokens * attributes).to(tl.int64)
    mean1 = tl.load(statistics + place, here, 0.0)
    rstd1 = tl.load(statistics + plane + place, here, 0.0)
    rstd2 = tl.load(statistics + 2 * plane + place, here, 1.0)
    mean = tl.zeros([BM], tl.float32)
    slope = tl.zeros([BM], tl.float32)
    partial = norm_partial + (tl.program_id(0) * attributes + a).to(tl.int64) * (4 * rank)
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        inside = here[:, None] & (c < rank)[None, :]
        to = row[:, None] * rank + c[None, :]
        grad = tl.load(z_grad + to, inside, 0.0)
        value = tl.load(normed + to, inside, 0.0)
        scale = tl.load(gamma + c, c < rank, 0.0).to(tl.float32)
        z0_grad = rstd2[:, None] * (
            grad * scale[None, :] - row_sum[:, None] / rank - value * (row_slope[:, None] / rank)
        )
        z0_grad = tl.where(inside, z0_grad, 0.0)
        scaled = (z0_grad * rstd1[:, None]).to(normed_grad.dtype.element_ty)
        tl.store(normed_grad + to, scaled, inside)
        rounded = scaled.to(tl.float32)
        tl.store(partial + c, tl.sum(grad * value, 0), c < rank)
        tl.store(partial + rank + c, tl.sum(grad, 0), c < rank)
        tl.store(partial + 2 * rank + c, tl.sum(z0_grad, 0), c < rank)
        tl.store(partial + 3 * rank + c, tl.sum(rounded * mean1[:, None], 0), c < rank)
        mean += tl.sum(rounded * tl.load(column_sums + c, c < rank, 0.0)[None, :], 1)
        # z0 less its mean, which drops out: the gradient of a norm's input sums to 0.
        moved = value / rstd2[:, None] - tl.load(shift + c, c < rank, 0.0)[None, :]
        slope += tl.sum(rounded * moved, 1)
    mean /= width
    slope /= width
    tl.store(row_terms + 2 * row, -rstd1 * slope, here)
    tl.store(row_terms + 2 * row + 1, mean1 * rstd1 * slope - mean, here)
