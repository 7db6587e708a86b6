"""Triton functions of AoMoA's backward where every expert runs on every row of a tile.

What the experts of a tile need stays in registers, in tuples by expert: of what a program writes it
reads back the scores alone, and z's gradient where the rank is long. Tiles and rows as in
``triton_products.py``.
"""

# Tuples grow from (), expert by expert.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels.aomoa.triton_mixture import (
    _LOG_EPSILON,
    _MOST,
    _NOISE_FLOOR,
    gate_of,
    z_chunk,
)

_LOG_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(INTERPRETED)
# Columns of a tile with the clean scores of all experts side by side with the raw deviations:
# MOST_UNROLLED experts, and what tl.dot takes at least.
_SCORES = tl.constexpr(16)


@triton.jit
def fast_log2(x):
    """The hardware's, absolutely within 2e-7 between 0.5 and 2, relatively elsewhere."""
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def _softplus(x):
    """``triton_mixture.softplus`` by `fast_log2`: something of 0.1 at least is added to it."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x > 0, x, 0.0) + fast_log2(1.0 + e) * _LOG_2


@triton.jit
def _router_weight(
    gate, gate_noise, a, c, j, rank: tl.constexpr, EXPERTS: tl.constexpr, NOISY: tl.constexpr
):
    """gate and gate_noise of attribute a side by side: entries of columns c and scores j, tensors
    that broadcast."""
    known = c < rank
    at = (a * rank + c) * EXPERTS + j
    weight = tl.load(gate + at, known & (j < EXPERTS), 0.0)
    if NOISY:
        noisy = known & (j >= EXPERTS) & (j < 2 * EXPERTS)
        weight += tl.load(gate_noise + at - EXPERTS, noisy, 0.0)
    return weight


@triton.jit
def hidden_and_scores(
    normed, gamma, beta, gate, gate_noise, fc1, fc1_bias, hidden_rows, scores, a, row, here,
    rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr, NOISY: tl.constexpr,
    BM: tl.constexpr, BZ: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The hidden layers [BM, BH] of all experts, rounded, which also go to hidden_rows; clean
    logits and raw deviations, as of ``triton_mixture.score``, to scores [R, 2 E]."""
    # In a loop triton lays all products out by their first: wider than it is high, warps share it.
    width: tl.constexpr = _SCORES if rank <= BZ else 2 * _SCORES
    j = tl.arange(0, width)
    narrow: tl.constexpr = gate.dtype.element_ty != tl.float32
    score = tl.zeros([BM, width], tl.float32)
    n = tl.arange(0, BH)
    inside = n < hidden
    sums = ()
    for _ in tl.static_range(EXPERTS):
        sums = sums + (tl.zeros([BM, BH], tl.float32),)  # noqa: RUF005
    for c0 in range(0, rank, BZ):
        c = c0 + tl.arange(0, BZ)
        z = z_chunk(normed, gamma, beta, row, here, c, rank)
        high = z.to(fc1.dtype.element_ty)
        added = ()
        for e in tl.static_range(EXPERTS):
            weight = tl.load(
                fc1 + (e * hidden + n)[None, :] * rank + c[:, None],
                (c < rank)[:, None] & inside[None, :],
                0.0,
            )
            added = added + (tl.dot(high, weight, sums[e], input_precision="ieee"),)  # noqa: RUF005
        sums = added
        weight = _router_weight(gate, gate_noise, a, c[:, None], j[None, :], rank, EXPERTS, NOISY)
        score = tl.dot(high, weight, score, input_precision="ieee")
        if narrow:
            low = (z - high.to(tl.float32)).to(gate.dtype.element_ty)
            score = tl.dot(low, weight, score)
    tl.store(
        scores + row[:, None] * (2 * EXPERTS) + j[None, :],
        score,
        here[:, None] & (j < 2 * EXPERTS)[None, :],
    )
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
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """From the hidden layers `values` to the log-sum-exp and back: gates times their gradients
    [BM], and the gradients [BM, BH] of all hidden layers, rounded, which also go to
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
            log_gate = fast_log2(tl.where(taken, gate, 1.0))
            term = tl.where(taken[:, None], y * LOG2_E + log_gate[:, None], float("-inf"))
            peak = tl.maximum(term, peak)  # a NaN comes in through the total
            weights = weights + (weight,)  # noqa: RUF005
            terms = terms + (term,)  # noqa: RUF005
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.zeros([BM, BC], tl.float32)
        powers = ()
        for e in tl.static_range(EXPERTS):
            power = tl.exp2(terms[e] - base)
            total += power
            powers = powers + (power,)  # noqa: RUF005
        none = total == 0
        total = tl.where(none, 1.0, total)
        log_total = fast_log2(total)  # of 1 to E
        value = tl.where(none, _LOG_EPSILON, (base + log_total) * _LOG_2)
        to = row[:, None] * rank + c[None, :]
        tl.store(combined + to, value, full)
        tl.store(mixed + to, value.to(mixed.dtype.element_ty), full)
        scaled = upstream.to(tl.float32) * tl.exp2(-log_total)
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
    for e in tl.static_range(EXPERTS):
        grad = tl.where(values[e] <= 0, 0.0, sums[e]).to(hidden_grad.dtype.element_ty)
        tl.store(
            hidden_grad + (row[:, None] * EXPERTS + e) * hidden + n[None, :],
            grad,
            here[:, None] & inside[None, :],
        )
        grads = grads + (grad,)  # noqa: RUF005
    return shares, grads


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


@triton.jit
def _before(one, other, first: tl.constexpr):
    """Whether a score comes before another: by its integer, at a tie the lower expert's."""
    return (one >= other) if first else (one > other)


@triton.jit
def router_backward(
    scores, noise, gates, gates_grad, load_grad, shares, noise_grad, router_grad, a, row, place,
    here, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Routing done again and its gradient: clean and raw scores' [BM, 16] side by side, rounded,
    which also go to router_grad [R, 2 E]. ``triton_mixture.route`` by columns: no reductions.

    shares: gates times their gradients by the mixture. noise, gates, gates_grad, noise_grad: at the
    tile's first row, [T, E] from there.
    """
    cleans = ()
    raws = ()
    stds = ()
    draws = ()
    logits = ()
    keys = ()
    kept = ()
    for e in tl.static_range(EXPERTS):
        logit = tl.load(scores + row * (2 * EXPERTS) + e, here, 0.0)
        cleans = cleans + (logit,)  # noqa: RUF005
        if NOISY:
            raw = tl.load(scores + row * (2 * EXPERTS) + EXPERTS + e, here, 0.0)
            std = _softplus(raw) + _NOISE_FLOOR
            drawn = tl.load(noise + place * EXPERTS + e, here, 0.0)
            logit += drawn * std
            raws = raws + (raw,)  # noqa: RUF005
            stds = stds + (std,)  # noqa: RUF005
            draws = draws + (drawn,)  # noqa: RUF005
        # Integers in the order of the floats, -0 being 0; NaN is the largest.
        bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & _MOST)
        keys = keys + (tl.where(logit != logit, _MOST, key),)  # noqa: RUF005
        kept = kept + (gate_of(gates, place, here, e, EXPERTS) != 0,)  # noqa: RUF005
        logits = logits + (logit,)  # noqa: RUF005
    # How many experts come before each. Those with a gate come first, whatever the rounding of
    # scores that were as good as equal: the choice is that of forward.
    orders = ()
    largest = tl.zeros([BM], tl.float32)
    last = tl.zeros([BM], tl.float32)
    following = tl.zeros([BM], tl.float32)
    for e in tl.static_range(EXPERTS):
        order = tl.zeros([BM], tl.int32)
        for other in tl.static_range(EXPERTS):
            if other != e:
                before = _before(keys[other], keys[e], other < e)
                before = tl.where(kept[other] == kept[e], before, kept[other])
                order += before.to(tl.int32)
        largest += tl.where(order == 0, logits[e], 0.0)
        last += tl.where(order == TOP_K - 1, logits[e], 0.0)
        following += tl.where(order == TOP_K, logits[e], 0.0)
        orders = orders + (order,)  # noqa: RUF005
    exponentials = ()
    weight_sum = tl.zeros([BM], tl.float32)
    share_sum = tl.zeros([BM], tl.float32)
    whole = ()
    for e in tl.static_range(EXPERTS):
        exponential = tl.where(orders[e] < TOP_K, tl.exp(logits[e] - largest), 0.0)
        exponentials = exponentials + (exponential,)  # noqa: RUF005
        weight_sum += exponential
        share = shares[e]
        if gates_grad is not None:
            gate = gate_of(gates, place, here, e, EXPERTS)
            upstream = tl.load(gates_grad + place * EXPERTS + e, here, 0.0)
            share += tl.where(kept[e], gate * upstream, 0.0)
        share_sum += share
        whole = whole + (share,)  # noqa: RUF005
    loads: tl.constexpr = NOISY and load_grad is not None and TOP_K < EXPERTS
    slopes = ()
    ratios = ()
    of_last = tl.zeros([BM], tl.float32)
    of_following = tl.zeros([BM], tl.float32)
    if loads:
        for e in tl.static_range(EXPERTS):
            chosen = orders[e] < TOP_K
            inverse = 1.0 / stds[e]
            u = (cleans[e] - tl.where(chosen, following, last)) * inverse
            upstream = tl.load(load_grad + a * EXPERTS + e)
            slope = upstream * tl.exp(-0.5 * u * u) * 0.3989422804014327 * inverse
            of_following += tl.where(chosen, slope, 0.0)
            of_last += tl.where(chosen, 0.0, slope)
            slopes = slopes + (slope,)  # noqa: RUF005
            ratios = ratios + (u,)  # noqa: RUF005
    j = tl.arange(0, _SCORES)[None, :]
    grads = tl.zeros([BM, _SCORES], tl.float32)
    for e in tl.static_range(EXPERTS):
        weight = exponentials[e] / weight_sum
        grad = tl.where(orders[e] < TOP_K, whole[e] - weight * share_sum, 0.0)
        clean_grad = grad
        if NOISY:
            raw_grad = tl.zeros([BM], tl.float32)
            if loads:
                grad -= tl.where(orders[e] == TOP_K, of_following, 0.0)
                grad -= tl.where(orders[e] == TOP_K - 1, of_last, 0.0)
                clean_grad = grad + slopes[e]
                raw_grad = -slopes[e] * ratios[e]
            raw_grad = (raw_grad + grad * draws[e]) / (1.0 + tl.exp(-raws[e]))
            grads = tl.where(j == EXPERTS + e, raw_grad[:, None], grads)
            if noise_grad is not None:
                tl.store(noise_grad + place * EXPERTS + e, grad * stds[e], here)
        grads = tl.where(j == e, clean_grad[:, None], grads)
    rounded = grads.to(router_grad.dtype.element_ty)
    tl.store(
        router_grad + row[:, None] * (2 * EXPERTS) + j, rounded, here[:, None] & (j < 2 * EXPERTS)
    )
    return rounded


@triton.jit
def through_router(
    score_grads, gate, gate_noise, a, c, rank: tl.constexpr, EXPERTS: tl.constexpr,
    NOISY: tl.constexpr,
):  # fmt: skip
    """The share [BM, BC] of z's gradient at columns c that the scores' brings."""
    j = tl.arange(0, _SCORES)
    weight = _router_weight(gate, gate_noise, a, c[None, :], j[:, None], rank, EXPERTS, NOISY)
    return tl.dot(score_grads, weight, input_precision="ieee")
