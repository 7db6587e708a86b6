"""Triton kernels of AoMoA's forward, and what backward shares with them.

Programs take tiles of tokens of one attribute: row = token * attributes + attribute. Launched by
``triton.py``; the maths is in README.md. Where a program reads what it wrote to global memory
itself, a barrier stands between; no program reads what another of the same launch writes.
"""

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
            at = pid.to(tl.int64) * width + k
            weight = tl.load(down + at, k < width, 0.0).to(tl.float32)
            scale = tl.load(gamma + k, k < width, 0.0).to(tl.float32)
            product = (scale * weight).to(folded.dtype.element_ty)
            tl.store(folded + at, product, k < width)
            sums += product.to(tl.float32)
            moved += tl.load(beta + k, k < width, 0.0).to(tl.float32) * weight
        tl.store(column_sums + pid, tl.sum(sums, 0))
        tl.store(shift + pid, tl.sum(moved, 0))
    elif SCALE:
        at = (pid - rank).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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
    first = tl.load(x + row[:, None] * width + k[None, :], here[:, None] & (k < width)[None, :], 0.0)
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
                folded + n[None, :].to(tl.int64) * width + (k0 + k)[:, None],
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
        tl.store(
            normed + row[:, None] * rank + n[None, :], z0, here[:, None] & known[None, :]
        )
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
def z_chunk(normed, gamma, beta, row, here, c, rank: tl.constexpr, like):
    """norm2's output at columns c [BC], in the type of `like`; 0 outside."""
    known = c < rank
    full = here[:, None] & known[None, :]
    value = tl.load(normed + row[:, None] * rank + c[None, :], full, 0.0)
    scale = tl.load(gamma + c, known, 0.0).to(tl.float32)
    offset = tl.load(beta + c, known, 0.0).to(tl.float32)
    value = tl.where(full, value * scale[None, :] + offset[None, :], 0.0)
    return value.to(like.dtype.element_ty)


@triton.jit
def score(
    normed, gamma, beta, gate, gate_noise, a, row, here, rank: tl.constexpr,
    EXPERTS: tl.constexpr, NOISY: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Clean logits and raw deviations [BM, EP] of attribute a."""
    e = tl.arange(0, EP)
    clean = tl.zeros([BM, EP], tl.float32)
    raw = tl.zeros([BM, EP], tl.float32)
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        z = z_chunk(normed, gamma, beta, row, here, c, rank, gate)
        at = (a.to(tl.int64) * rank + c)[:, None] * EXPERTS + e[None, :]
        known = (c < rank)[:, None] & (e < EXPERTS)[None, :]
        clean = tl.dot(z, tl.load(gate + at, known, 0.0), clean, input_precision="ieee")
        if NOISY:
            raw = tl.dot(z, tl.load(gate_noise + at, known, 0.0), raw, input_precision="ieee")
    return clean, raw


@triton.jit
def softplus(x):
    return tl.where(x > 0, x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def pick(values, place, EP: tl.constexpr):
    """values[i, place[i]] for values [BM, EP]."""
    return tl.sum(tl.where(tl.arange(0, EP)[None, :] == place[:, None], values, 0.0), 1)


@triton.jit
def _first(key, EP: tl.constexpr):
    e = tl.arange(0, EP)[None, :]
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], e, EP), 1)


@triton.jit
def route(
    logits, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr, EP: tl.constexpr
):
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
def column(values, e, EP: tl.constexpr):
    """values[:, e] of [BM, EP]."""
    return tl.sum(tl.where(tl.arange(0, EP)[None, :] == e, values, 0.0), 1)


@triton.jit
def any_row(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


@triton.jit
def hidden_layer(
    normed, gamma, beta, fc1, fc1_bias, hidden_rows, gates, row, here,
    rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """relu(z fc1^T + bias) to hidden_rows [R, E, h], of the experts that a row of the tile takes."""
    for e in range(EXPERTS):
        if any_row((column(gates, e, EP) != 0) & here):
            for n0 in range(0, hidden, BH):
                n = n0 + tl.arange(0, BH)
                known = n < hidden
                acc = tl.zeros([BM, BH], tl.float32)
                for c0 in range(0, rank, BC):
                    c = c0 + tl.arange(0, BC)
                    z = z_chunk(normed, gamma, beta, row, here, c, rank, fc1)
                    at = (e * hidden + n).to(tl.int64)[None, :] * rank + c[:, None]
                    weight = tl.load(fc1 + at, (c < rank)[:, None] & known[None, :], 0.0)
                    acc = tl.dot(z, weight, acc, input_precision="ieee")
                acc += tl.load(fc1_bias + e * hidden + n, known, 0.0).to(tl.float32)[None, :]
                acc = tl.where(acc < 0, 0.0, acc)  # NaN stays
                tl.store(
                    hidden_rows + (row[:, None] * EXPERTS + e) * hidden + n[None, :],
                    acc.to(hidden_rows.dtype.element_ty),
                    here[:, None] & known[None, :],
                )


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
        at = (e * rank + c).to(tl.int64)[None, :] * hidden + n[:, None]
        weight = tl.load(fc2 + at, inside[:, None] & known[None, :], 0.0)
        acc = tl.dot(values, weight, acc, input_precision="ieee")
    return acc + tl.load(fc2_bias + e * rank + c, known, 0.0).to(tl.float32)[None, :]


@triton.jit
def combine(
    hidden_rows, fc2, fc2_bias, gates, row, here, c, rank: tl.constexpr, hidden: tl.constexpr,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """log(sum of gate exp(output)) [BM, BC] at columns c."""
    peak = tl.full([BM, BC], float("-inf"), tl.float32)
    total = tl.zeros([BM, BC], tl.float32)
    for e in range(EXPERTS):
        gate = column(gates, e, EP)
        taken = (gate != 0) & here
        if any_row(taken):
            y = output_layer(
                hidden_rows, fc2, fc2_bias, e, row, here, c, rank, hidden, EXPERTS, BM, BC, BH
            )
            term = tl.where(
                taken[:, None], y + tl.log(tl.where(taken, gate, 1.0))[:, None], float("-inf")
            )
            higher = tl.where(term > peak, term, peak)  # a NaN comes in through the total
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - base) + tl.exp(term - base)
            peak = higher
    return tl.where(total == 0, _LOG_EPSILON, peak + tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit(do_not_specialize=["tokens"])
def mixture(
    normed, gamma, beta, gate, gate_noise, noise, fc1, fc1_bias, fc2, fc2_bias,
    gates, load_partial, hidden_rows, mixed,
    tokens, attributes: tl.constexpr, rank: tl.constexpr, hidden: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EP: tl.constexpr,
):  # fmt: skip
    """Router, gates [A, T, E], the tile's load [tiles, A, E], experts, their log-sum-exp [R, r]."""
    a = tl.program_id(1)
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    here = t < tokens
    row = t.to(tl.int64) * attributes + a
    e = tl.arange(0, EP)
    full = here[:, None] & (e < EXPERTS)[None, :]
    at = (a.to(tl.int64) * tokens + t)[:, None] * EXPERTS + e[None, :]
    clean, raw = score(
        normed, gamma, beta, gate, gate_noise, a, row, here, rank, EXPERTS, NOISY, BM, BC, EP
    )
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

    hidden_layer(
        normed, gamma, beta, fc1, fc1_bias, hidden_rows, weight, row, here, rank, hidden,
        EXPERTS, BM, BC, BH, EP,
    )  # fmt: skip
    tl.debug_barrier()
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        total = combine(
            hidden_rows, fc2, fc2_bias, weight, row, here, c, rank, hidden, EXPERTS, BM, BC, BH, EP
        )
        tl.store(
            mixed + row[:, None] * rank + c[None, :],
            total.to(mixed.dtype.element_ty),
            here[:, None] & (c < rank)[None, :],
        )


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
                up + n[None, :].to(tl.int64) * rank + (k0 + k)[:, None],
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
                weight + o[None, :].to(tl.int64) * width + (k0 + k)[:, None],
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
