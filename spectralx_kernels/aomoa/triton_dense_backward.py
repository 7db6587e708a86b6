"""Triton kernel of AoMoA's backward from the mixture to the down product, experts in registers.

Tiles and rows as in ``triton_products.py``; what the experts need is in ``triton_dense.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.aomoa.triton_backward import through_fc1_rows
from spectralx_kernels.aomoa.triton_dense import (
    experts_backward,
    hidden_and_scores,
    router_backward,
    through_fc1,
    through_router,
)


@triton.jit
def _norm_slopes(z_grad, value, gamma, c, row_sum, row_slope, rank: tl.constexpr):
    """The two sums over a row [BM] that norm2's backward takes, with columns c of z's gradient,
    `value` being norm2's output before its weight; both 0 outside."""
    scaled = z_grad * tl.load(gamma + c, c < rank, 0.0).to(tl.float32)[None, :]
    return row_sum + tl.sum(scaled, 1), row_slope + tl.sum(scaled * value, 1)


@triton.jit
def _through_norm(
    grad, value, gamma, column_sums, shift, normed_grad, partial, row, here, c, row_sum, row_slope,
    mean1, rstd1, rstd2, mean, slope, rank: tl.constexpr,
):  # fmt: skip
    """Columns c of z's gradient through norm2, to normed_grad and `partial`; the two sums over a
    row of what norm1 adds to x's gradient."""
    known = c < rank
    inside = here[:, None] & known[None, :]
    scale = tl.load(gamma + c, known, 0.0).to(tl.float32)
    z0_grad = rstd2[:, None] * (
        grad * scale[None, :] - row_sum[:, None] / rank - value * (row_slope[:, None] / rank)
    )
    z0_grad = tl.where(inside, z0_grad, 0.0)
    scaled = (z0_grad * rstd1[:, None]).to(normed_grad.dtype.element_ty)
    tl.store(normed_grad + row[:, None] * rank + c[None, :], scaled, inside)
    rounded = scaled.to(tl.float32)
    tl.store(partial + c, tl.sum(grad * value, 0), known)
    tl.store(partial + rank + c, tl.sum(grad, 0), known)
    tl.store(partial + 2 * rank + c, tl.sum(z0_grad, 0), known)
    tl.store(partial + 3 * rank + c, tl.sum(rounded * mean1[:, None], 0), known)
    mean += tl.sum(rounded * tl.load(column_sums + c, known, 0.0)[None, :], 1)
    # z0 less its mean, which drops out: the gradient of a norm's input sums to 0.
    moved = value / rstd2[:, None] - tl.load(shift + c, known, 0.0)[None, :]
    return mean, slope + tl.sum(rounded * moved, 1)


@triton.jit(do_not_specialize=["tokens"])
def dense_backward(
    gates, normed, statistics, gamma, beta, gate, gate_noise, noise, fc1, fc1_bias, fc2, fc2_bias,
    column_sums, shift, mixed_grad, gates_grad, load_grad,
    hidden_rows, hidden_grad, combined, mixed, router_grad, noise_grad, scores, z_grad,
    normed_grad, row_terms, norm_partial,
    tokens, attributes: tl.constexpr, width: tl.constexpr, rank: tl.constexpr,
    hidden: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BZ: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`mixture_backward` where all experts run on all rows: BC columns of their outputs at once, BZ
    of z and its gradient. For this kernel alone besides: scores [R, 2 E], and z_grad [R, r] where
    the rank is longer than BZ.
    """
    whole: tl.constexpr = rank <= BZ
    a = tl.program_id(1)
    i = tl.arange(0, BM)
    first = tl.program_id(0) * BM
    here = first + i < tokens
    # Pointers go to the tile's first row, so that places in it are 32-bit integers.
    first_row = first.to(tl.int64) * attributes + a
    first_place = a.to(tl.int64) * tokens + first
    plane = (tokens * attributes).to(tl.int64)
    normed += first_row * rank
    combined += first_row * rank
    mixed += first_row * rank
    if not whole:
        z_grad += first_row * rank
    normed_grad += first_row * rank
    hidden_rows += first_row * (EXPERTS * hidden)
    hidden_grad += first_row * (EXPERTS * hidden)
    router_grad += first_row * (2 * EXPERTS)
    row_terms += first_row * 2
    mixed_grad += first_place * rank
    gates += first_place * EXPERTS
    if NOISY:
        noise += first_place * EXPERTS
        if noise_grad is not None:
            noise_grad += first_place * EXPERTS
    if gates_grad is not None:
        gates_grad += first_place * EXPERTS
    scores += first_row * (2 * EXPERTS)
    statistics += first_place
    row = i * attributes
    place = i

    values = hidden_and_scores(
        normed, gamma, beta, gate, gate_noise, fc1, fc1_bias, hidden_rows, scores, a, row,
        here, rank, hidden, EXPERTS, NOISY, BM, BZ, BH,
    )  # fmt: skip
    tl.debug_barrier()
    shares, grads = experts_backward(
        values, gates, fc2, fc2_bias, mixed_grad, combined, mixed, hidden_grad, row, place,
        here, rank, hidden, EXPERTS, BM, BC, BH,
    )  # fmt: skip
    score_grads = router_backward(
        scores, noise, gates, gates_grad, load_grad, shares, noise_grad, router_grad, a, row,
        place, here, EXPERTS, TOP_K, NOISY, BM,
    )  # fmt: skip

    # z's gradient through norm2, and what norm1 adds to a row of x's gradient.
    mean1 = tl.load(statistics + place, here, 0.0)
    rstd1 = tl.load(statistics + plane + place, here, 0.0)
    rstd2 = tl.load(statistics + 2 * plane + place, here, 1.0)
    row_sum = tl.zeros([BM], tl.float32)
    row_slope = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    slope = tl.zeros([BM], tl.float32)
    partial = norm_partial + (tl.program_id(0) * attributes + a).to(tl.int64) * (4 * rank)
    if whole:
        c = tl.arange(0, BZ)
        inside = here[:, None] & (c < rank)[None, :]
        value = tl.load(normed + row[:, None] * rank + c[None, :], inside, 0.0)
        grad = through_router(score_grads, gate, gate_noise, a, c, rank, EXPERTS, NOISY)
        grad = through_fc1(grad, grads, fc1, c, rank, hidden, EXPERTS, BH)
        grad = tl.where(inside, grad, 0.0)
        row_sum, row_slope = _norm_slopes(grad, value, gamma, c, row_sum, row_slope, rank)
        mean, slope = _through_norm(
            grad, value, gamma, column_sums, shift, normed_grad, partial, row, here, c, row_sum,
            row_slope, mean1, rstd1, rstd2, mean, slope, rank,
        )  # fmt: skip
    else:
        tl.debug_barrier()
        for c0 in range(0, rank, BC):
            c = c0 + tl.arange(0, BC)
            inside = here[:, None] & (c < rank)[None, :]
            grad = through_router(score_grads, gate, gate_noise, a, c, rank, EXPERTS, NOISY)
            grad = through_fc1_rows(
                grad, hidden_grad, fc1, row, here, 0, EXPERTS * hidden, c, rank,
                EXPERTS * hidden, BN,
            )  # fmt: skip
            to = row[:, None] * rank + c[None, :]
            tl.store(z_grad + to, grad, inside)
            value = tl.load(normed + to, inside, 0.0)
            grad = tl.where(inside, grad, 0.0)
            row_sum, row_slope = _norm_slopes(grad, value, gamma, c, row_sum, row_slope, rank)
        tl.debug_barrier()
        for c0 in range(0, rank, BC):
            c = c0 + tl.arange(0, BC)
            inside = here[:, None] & (c < rank)[None, :]
            to = row[:, None] * rank + c[None, :]
            mean, slope = _through_norm(
                tl.load(z_grad + to, inside, 0.0), tl.load(normed + to, inside, 0.0), gamma,
                column_sums, shift, normed_grad, partial, row, here, c, row_sum, row_slope, mean1,
                rstd1, rstd2, mean, slope, rank,
            )  # fmt: skip
    mean /= width
    slope /= width
    tl.store(row_terms + 2 * row, -rstd1 * slope, here)
    tl.store(row_terms + 2 * row + 1, mean1 * rstd1 * slope - mean, here)
