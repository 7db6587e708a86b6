"""Triton kernel of AoMoA's mixture in forward, and the functions that backward shares with it.

Tiles and rows as in ``triton_products.py``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.aomoa.reference import GATE_FLOOR, LOG_EPSILON, NOISE_FLOOR

_NOISE_FLOOR = tl.constexpr(NOISE_FLOOR)
_GATE_FLOOR = tl.constexpr(GATE_FLOOR)
_LOG_EPSILON = tl.constexpr(LOG_EPSILON)
_LEAST = tl.constexpr(-(2**31))
_MOST = tl.constexpr(2**31 - 1)


@triton.jit
def z_chunk(normed, gamma, beta, row, here, c, rank: tl.constexpr):
    """norm2's output [BM, BC] at columns c; 0 outside."""
    known = c < rank
    full = here[:, None] & known[None, :]
    value = tl.load(normed + row[:, None] * rank + c[None, :], full, 0.0)
    scale = tl.load(gamma + c, known, 0.0).to(tl.float32)
    offset = tl.load(beta + c, known, 0.0).to(tl.float32)
    return tl.where(full, value * scale[None, :] + offset[None, :], 0.0)


@triton.jit
def score(
    normed, gamma, beta, gate, gate_noise, a, row, here, rank: tl.constexpr,
    EXPERTS: tl.constexpr, NOISY: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Clean logits and raw deviations [BM, EP] of attribute a.

    z goes in as it is rounded and as what that leaves: rounded alone it would give tokens to other
    experts than float32 does.
    """
    e = tl.arange(0, EP)
    clean = tl.zeros([BM, EP], tl.float32)
    raw = tl.zeros([BM, EP], tl.float32)
    narrow: tl.constexpr = gate.dtype.element_ty != tl.float32
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        z = z_chunk(normed, gamma, beta, row, here, c, rank)
        high = z.to(gate.dtype.element_ty)
        at = (a * rank + c)[:, None] * EXPERTS + e[None, :]
        known = (c < rank)[:, None] & (e < EXPERTS)[None, :]
        weight = tl.load(gate + at, known, 0.0)
        clean = tl.dot(high, weight, clean, input_precision="ieee")
        if narrow:
            low = (z - high.to(tl.float32)).to(gate.dtype.element_ty)
            clean = tl.dot(low, weight, clean)
        if NOISY:
            weight = tl.load(gate_noise + at, known, 0.0)
            raw = tl.dot(high, weight, raw, input_precision="ieee")
            if narrow:
                raw = tl.dot(low, weight, raw)
    return clean, raw


@triton.jit
def softplus(x):
    # log1p: the rounding of 1 + e is made up for, as a deviation of 0.1 is what it is added to.
    e = tl.exp(-tl.abs(x))
    above = 1.0 + e
    log1p = tl.where(
        above == 1.0, e, tl.log(above) * (e / tl.where(above == 1.0, 1.0, above - 1.0))
    )
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def pick(values, place, EP: tl.constexpr):
    """values[i, place[i]] for values [BM, EP]."""
    return tl.sum(tl.where(tl.arange(0, EP)[None, :] == place[:, None], values, 0.0), 1)


@triton.jit
def _first(key, EP: tl.constexpr):
    e = tl.arange(0, EP)[None, :]
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], e, EP), 1)


@triton.jit
def route(logits, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr, EP: tl.constexpr):
    """Whether each expert is chosen, its softmax among the chosen, and the places of the k-th and
    the (k + 1)-th largest logit. NaN ranks first, ties go to the lower place."""
    e = tl.arange(0, EP)[None, :]
    # Integers in the order of the floats, -0 being 0; the least is for what is out.
    bits = tl.where(logits == 0, 0.0, logits).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & _MOST)
    key = tl.where(logits != logits, _MOST, key)
    key = tl.where(e < EXPERTS, key, _LEAST)
    largest = pick(logits, _first(key, EP), EP)
    chosen = tl.zeros([BM, EP], tl.int32)
    last = tl.zeros([BM], tl.int32)
    for _ in range(TOP_K):
        last = _first(key, EP)
        hit = e == last[:, None]
        chosen = tl.where(hit, 1, chosen)
        key = tl.where(hit, _LEAST, key)
    following = _first(key, EP)
    weight = tl.where(chosen != 0, tl.exp(logits - largest[:, None]), 0.0)
    weight = tl.where(chosen != 0, weight / tl.sum(weight, 1)[:, None], 0.0)
    return chosen != 0, weight, last, following


@triton.jit
def gate_of(gates, place, here, e, EXPERTS: tl.constexpr):
    """Gates [BM] of expert e, from memory: what a product made does not reach the reduction of a
    vector to a flag (`any_row`), on which triton 3.6 fails for sm_100."""
    return tl.load(gates + place * EXPERTS + e, here, 0.0)


@triton.jit
def any_row(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def _hidden_columns(
    normed, gamma, beta, fc1, fc1_bias, hidden_rows, row, here, first, columns: tl.constexpr,
    rank: tl.constexpr, all_columns: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """relu(z fc1^T + bias) to hidden_rows [R, E h] at `columns` columns from `first` on."""
    for n0 in range(0, columns, BH):
        n = n0 + tl.arange(0, BH)
        known = n < columns
        n += first
        acc = tl.zeros([BM, BH], tl.float32)
        for c0 in range(0, rank, BC):
            c = c0 + tl.arange(0, BC)
            z = z_chunk(normed, gamma, beta, row, here, c, rank).to(fc1.dtype.element_ty)
            at = n[None, :] * rank + c[:, None]
            weight = tl.load(fc1 + at, (c < rank)[:, None] & known[None, :], 0.0)
            acc = tl.dot(z, weight, acc, input_precision="ieee")
        acc += tl.load(fc1_bias + n, known, 0.0).to(tl.float32)[None, :]
        acc = tl.where(acc < 0, 0.0, acc)  # NaN stays
        tl.store(
            hidden_rows + row[:, None] * all_columns + n[None, :],
            acc.to(hidden_rows.dtype.element_ty),
            here[:, None] & known[None, :],
        )


@triton.jit
def hidden_layer(
    normed, gamma, beta, fc1, fc1_bias, hidden_rows, gates, row, place, here,
    rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr, DENSE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Hidden layers to hidden_rows [R, E, h]: DENSE, of all experts in products of BN columns;
    else of those that a row of the tile takes, one by one."""
    columns: tl.constexpr = EXPERTS * hidden
    if DENSE:
        _hidden_columns(
            normed, gamma, beta, fc1, fc1_bias, hidden_rows, row, here, 0, columns, rank, columns,
            BM, BC, BN,
        )  # fmt: skip
    else:
        for e in range(EXPERTS):
            if any_row(gate_of(gates, place, here, e, EXPERTS) != 0):
                _hidden_columns(
                    normed, gamma, beta, fc1, fc1_bias, hidden_rows, row, here, e * hidden, hidden,
                    rank, columns, BM, BC, BH,
                )  # fmt: skip


@triton.jit
def output_layer(
    hidden_rows, fc2, fc2_bias, e, row, here, c, rank: tl.constexpr, hidden: tl.constexpr,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Expert e's output [BM, BC] at columns c."""
    acc = tl.zeros([BM, BC], tl.float32)
    known = c < rank
    for n0 in range(0, hidden, BH):
        n = n0 + tl.arange(0, BH)
        inside = n < hidden
        values = tl.load(
            hidden_rows + (row[:, None] * EXPERTS + e) * hidden + n[None, :],
            here[:, None] & inside[None, :],
            0.0,
        )
        at = (e * rank + c)[None, :] * hidden + n[:, None]
        weight = tl.load(fc2 + at, inside[:, None] & known[None, :], 0.0)
        acc = tl.dot(values, weight, acc, input_precision="ieee")
    return acc + tl.load(fc2_bias + e * rank + c, known, 0.0).to(tl.float32)[None, :]


@triton.jit
def add_term(peak, total, y, gate, taken):
    """One more term of a running log-sum-exp [BM, BC], peak + log(total): outputs y of an expert
    with gates [BM], `taken` where they are not 0."""
    term = tl.where(taken[:, None], y + tl.log(tl.where(taken, gate, 1.0))[:, None], float("-inf"))
    higher = tl.where(term > peak, term, peak)  # a NaN comes in through the total
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(peak - base) + tl.exp(term - base)


@triton.jit
def log_sum(peak, total):
    """What `add_term` has added up; of no term at all the published constant."""
    return tl.where(total == 0, _LOG_EPSILON, peak + tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit
def combine(
    hidden_rows, fc2, fc2_bias, gates, row, place, here, c,
    rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr, DENSE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """log(sum of gate exp(output)) [BM, BC] at columns c."""
    peak = tl.full([BM, BC], float("-inf"), tl.float32)
    total = tl.zeros([BM, BC], tl.float32)
    if DENSE:
        # Unrolled: what the experts read is under way at once.
        for e in tl.static_range(EXPERTS):
            gate = gate_of(gates, place, here, e, EXPERTS)
            taken = gate != 0
            y = output_layer(
                hidden_rows, fc2, fc2_bias, e, row, here, c, rank, hidden, EXPERTS, BM, BC, BH
            )
            peak, total = add_term(peak, total, y, gate, taken)
    else:
        for e in range(EXPERTS):
            gate = gate_of(gates, place, here, e, EXPERTS)
            taken = gate != 0
            if any_row(taken):
                y = output_layer(
                    hidden_rows, fc2, fc2_bias, e, row, here, c, rank, hidden, EXPERTS, BM, BC, BH
                )
                peak, total = add_term(peak, total, y, gate, taken)
    return log_sum(peak, total)


@triton.jit
def give_gates(
    clean, raw, noise, gates, load_partial, a, place, here, attributes: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr,
    BM: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Gates [BM, EP] from clean logits and raw deviations, to gates [A, T, E] too; the tile's load
    to load_partial [tiles, A, E]."""
    e = tl.arange(0, EP)
    full = here[:, None] & (e < EXPERTS)[None, :]
    at = place[:, None] * EXPERTS + e[None, :]
    std = softplus(raw) + _NOISE_FLOOR
    logits = clean
    if NOISY:
        logits = clean + tl.load(noise + at, full, 0.0) * std
    chosen, weight, last, following = route(logits, EXPERTS, TOP_K, BM, EP)
    weight = tl.where(weight <= _GATE_FLOOR, 0.0, weight)
    tl.store(gates + at, weight, full)
    stays = tl.where(weight != 0, 1.0, 0.0)
    if NOISY and TOP_K < EXPERTS:
        high = pick(logits, following, EP)
        low = pick(logits, last, EP)
        u = (clean - tl.where(chosen, high[:, None], low[:, None])) / std
        stays = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
    slot = (tl.program_id(0) * attributes + a) * EXPERTS + e
    tl.store(load_partial + slot, tl.sum(tl.where(full, stays, 0.0), 0), e < EXPERTS)
    return weight


@triton.jit
def finish_load(load_partial, load, counter, slots: tl.constexpr):
    """load [A E] from the tiles' [tiles, A E], in their order, by the program that comes last, told
    by `counter`, 0 before; past the L1 cache, as other multiprocessors wrote them."""
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    if before == tl.num_programs(0) * tl.num_programs(1) - 1:
        tiles = tl.num_programs(0)
        for s0 in range(0, slots, 64):
            s = s0 + tl.arange(0, 64)
            sums = tl.zeros([32, 64], tl.float32)
            i = tl.arange(0, 32)
            while tl.max(tiles - i, 0) > 0:
                inside = (i < tiles)[:, None] & (s < slots)[None, :]
                at = load_partial + i[:, None] * slots + s[None, :]
                sums += tl.load(at, inside, 0.0, cache_modifier=".cg")
                i += 32
            tl.store(load + s, tl.sum(sums, 0), s < slots)


@triton.jit(do_not_specialize=["tokens"])
def mixture(
    normed, gamma, beta, gate, gate_noise, noise, fc1, fc1_bias, fc2, fc2_bias,
    gates, load_partial, load, counter, hidden_rows, mixed,
    tokens, attributes: tl.constexpr, rank: tl.constexpr, hidden: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr, DENSE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Router, gates [A, T, E], experts, their log-sum-exp [R, r]; the tiles' loads [tiles, A, E],
    and their sum by the program that comes last, told by `counter`, 0 before."""
    a = tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < tokens
    row = t.to(tl.int64) * attributes + a
    place = a.to(tl.int64) * tokens + t
    clean, raw = score(
        normed, gamma, beta, gate, gate_noise, a, row, here, rank, EXPERTS, NOISY, BM, BC, EP
    )
    give_gates(
        clean, raw, noise, gates, load_partial, a, place, here, attributes, EXPERTS, TOP_K, NOISY,
        BM, EP,
    )  # fmt: skip
    tl.debug_barrier()
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
        tl.store(
            mixed + row[:, None] * rank + c[None, :],
            total.to(mixed.dtype.element_ty),
            here[:, None] & (c < rank)[None, :],
        )
    finish_load(load_partial, load, counter, attributes * EXPERTS)
