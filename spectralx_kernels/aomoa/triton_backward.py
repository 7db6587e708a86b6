"""Triton kernels of AoMoA's backward. Tiles and rows as in ``triton_forward.py``.

Nothing of [R, E, r] is stored: the gradient of an expert's output is formed from its hidden rows,
the combination and its gradient wherever it is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.aomoa.triton_forward import (
    _GATE_FLOOR,
    _NOISE_FLOOR,
    any_row,
    column,
    combine,
    hidden_layer,
    output_layer,
    pick,
    route,
    score,
    softplus,
    z_chunk,
)


@triton.jit
def _output_grad(
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


@triton.jit(do_not_specialize=["tokens"])
def mixture_backward(
    normed, statistics, gamma, beta, gate, gate_noise, noise, fc1, fc1_bias, fc2, fc2_bias,
    column_sums, shift, mixed_grad, gates_grad, load_grad,
    hidden_rows, hidden_grad, combined, mixed, router_grad, noise_grad, z_grad, normed_grad,
    row_terms, norm_partial,
    tokens, attributes: tl.constexpr, width: tl.constexpr, rank: tl.constexpr,
    hidden: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NOISY: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EP: tl.constexpr,
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
    gates = tl.where(weight <= _GATE_FLOOR, 0.0, weight)
    hidden_layer(
        normed, gamma, beta, fc1, fc1_bias, hidden_rows, gates, row, here, rank, hidden,
        EXPERTS, BM, BC, BH, EP,
    )  # fmt: skip
    tl.debug_barrier()
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        total = combine(
            hidden_rows, fc2, fc2_bias, gates, row, here, c, rank, hidden, EXPERTS, BM, BC, BH, EP
        )
        to = row[:, None] * rank + c[None, :]
        inside = here[:, None] & (c < rank)[None, :]
        tl.store(combined + to, total, inside)
        tl.store(mixed + to, total.to(mixed.dtype.element_ty), inside)
    tl.debug_barrier()

    # Experts: gate times its gradient, and the hidden layer's gradient.
    shares = tl.zeros([BM, EP], tl.float32)
    for e in range(EXPERTS):
        gate_e = column(gates, e, EP)
        taken = (gate_e != 0) & here
        if any_row(taken):
            for n0 in range(0, hidden, BH):
                n = n0 + tl.arange(0, BH)
                acc = tl.zeros([BM, BH], tl.float32)
                share = tl.zeros([BM], tl.float32)
                for c0 in range(0, rank, BC):
                    c = c0 + tl.arange(0, BC)
                    grad = _output_grad(
                        hidden_rows, fc2, fc2_bias, combined, mixed_grad, e, gate_e, taken, row,
                        place, c, rank, hidden, EXPERTS, BM, BC, BH,
                    )  # fmt: skip
                    share += tl.sum(grad, 1)
                    weight_at = (e * rank + c).to(tl.int64)[:, None] * hidden + n[None, :]
                    right = tl.load(
                        fc2 + weight_at, (c < rank)[:, None] & (n < hidden)[None, :], 0.0
                    )
                    acc = tl.dot(grad.to(fc2.dtype.element_ty), right, acc, input_precision="ieee")
                shares = tl.where(e_all[None, :] == e, share[:, None], shares)
                to = (row[:, None] * EXPERTS + e) * hidden + n[None, :]
                inside = here[:, None] & (n < hidden)[None, :]
                value = tl.load(hidden_rows + to, inside, 0.0)
                acc = tl.where(value <= 0, 0.0, acc)
                tl.store(hidden_grad + to, acc.to(hidden_grad.dtype.element_ty), inside)

    # Router.
    if gates_grad is not None:
        shares += tl.where(gates != 0, gates * tl.load(gates_grad + at, full, 0.0), 0.0)
    logits_grad = tl.where(chosen, shares - weight * tl.sum(shares, 1)[:, None], 0.0)
    clean_grad = tl.zeros([BM, EP], tl.float32)
    raw_grad = tl.zeros([BM, EP], tl.float32)
    if NOISY:
        if load_grad is not None:
            if TOP_K < EXPERTS:
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
                logits_grad -= tl.where(
                    e_all[None, :] == following[:, None], of_high[:, None], 0.0
                ) + tl.where(e_all[None, :] == last[:, None], of_low[:, None], 0.0)
        drawn = tl.load(noise + at, full, 0.0)
        raw_grad = (raw_grad + logits_grad * drawn) / (1.0 + tl.exp(-raw))
        if noise_grad is not None:
            tl.store(noise_grad + at, logits_grad * std, full)
    clean_grad = (clean_grad + logits_grad).to(gate.dtype.element_ty)
    raw_grad = raw_grad.to(gate.dtype.element_ty)
    to = row[:, None] * (2 * EXPERTS) + e_all[None, :]
    tl.store(router_grad + to, clean_grad, full)
    tl.store(router_grad + to + EXPERTS, raw_grad, full)
    tl.debug_barrier()

    # z's gradient, and the two sums over a row that norm2's backward takes.
    row_sum = tl.zeros([BM], tl.float32)
    row_slope = tl.zeros([BM], tl.float32)
    for c0 in range(0, rank, BC):
        c = c0 + tl.arange(0, BC)
        inside = here[:, None] & (c < rank)[None, :]
        gate_at = (a.to(tl.int64) * rank + c)[None, :] * EXPERTS + e_all[:, None]
        gate_known = (c < rank)[None, :] & (e_all < EXPERTS)[:, None]
        acc = tl.dot(clean_grad, tl.load(gate + gate_at, gate_known, 0.0), input_precision="ieee")
        if NOISY:
            acc = tl.dot(
                raw_grad, tl.load(gate_noise + gate_at, gate_known, 0.0), acc,
                input_precision="ieee",
            )  # fmt: skip
        for e in range(EXPERTS):
            taken = (column(gates, e, EP) != 0) & here
            if any_row(taken):
                for n0 in range(0, hidden, BH):
                    n = n0 + tl.arange(0, BH)
                    left = tl.load(
                        hidden_grad + (row[:, None] * EXPERTS + e) * hidden + n[None, :],
                        taken[:, None] & (n < hidden)[None, :],
                        0.0,
                    )
                    weight_at = (e * hidden + n).to(tl.int64)[:, None] * rank + c[None, :]
                    right = tl.load(
                        fc1 + weight_at, (n < hidden)[:, None] & (c < rank)[None, :], 0.0
                    )
                    acc = tl.dot(left, right, acc, input_precision="ieee")
        to = row[:, None] * rank + c[None, :]
        tl.store(z_grad + to, acc, inside)
        scale = tl.load(gamma + c, c < rank, 0.0).to(tl.float32)
        scaled = tl.where(inside, acc * scale[None, :], 0.0)
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


@triton.jit(do_not_specialize=["tokens", "per_split", "tiles", "tiles_per_split"])
def weight_gradients(
    normed, gamma, beta, gates, fc2, fc2_bias, combined, mixed_grad,
    hidden_rows, hidden_grad, router_grad, norm_partial, parts,
    tokens, per_split, tiles, tiles_per_split,
    attributes: tl.constexpr, rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    SIZE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EP2: tl.constexpr,
):  # fmt: skip
    """Sums over one split of the rows, to its place in parts [splits, SIZE].

    Grid (chunks of the rank, groups, splits); a group is a chunk of an expert's hidden layer, an
    attribute's router or the norms. parts: fc2 [E, r, h], fc1 [E, h, r], fc2_bias [E, r], fc1_bias
    [E, h], router [A, 2 E, r], norms [4, r].
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    group = tl.program_id(1)
    split = tl.program_id(2)
    chunks: tl.constexpr = (hidden + BH - 1) // BH
    matrix: tl.constexpr = EXPERTS * rank * hidden
    biases: tl.constexpr = 2 * matrix
    router: tl.constexpr = biases + EXPERTS * (rank + hidden)
    norms: tl.constexpr = router + attributes * 2 * EXPERTS * rank
    part = parts + split.to(tl.int64) * SIZE
    known = c < rank
    if group < EXPERTS * chunks:
        e = group // chunks
        n = group % chunks * BH + tl.arange(0, BH)
        inside = n < hidden
        fc1_grad = tl.zeros([BH, BC], tl.float32)
        fc2_grad = tl.zeros([BC, BH], tl.float32)
        fc1_bias_grad = tl.zeros([BH], tl.float32)
        fc2_bias_grad = tl.zeros([BC], tl.float32)
        rows = tokens.to(tl.int64) * attributes
        first = split.to(tl.int64) * per_split
        end = tl.minimum(first + per_split, rows)
        while first < end:
            row = first + tl.arange(0, BM)
            place = row % attributes * tokens + row // attributes
            gate = tl.load(gates + place * EXPERTS + e, row < end, 0.0)
            taken = gate != 0
            if any_row(taken):
                z = z_chunk(normed, gamma, beta, row, taken, c, rank, hidden_grad)
                to = (row[:, None] * EXPERTS + e) * hidden + n[None, :]
                full = taken[:, None] & inside[None, :]
                inner = tl.load(hidden_grad + to, full, 0.0)
                values = tl.load(hidden_rows + to, full, 0.0)
                grad = _output_grad(
                    hidden_rows, fc2, fc2_bias, combined, mixed_grad, e, gate, taken, row, place,
                    c, rank, hidden, EXPERTS, BM, BC, BH,
                )  # fmt: skip
                fc1_grad = tl.dot(tl.trans(inner), z, fc1_grad, input_precision="ieee")
                fc1_bias_grad += tl.sum(inner.to(tl.float32), 0)
                fc2_bias_grad += tl.sum(grad, 0)
                fc2_grad = tl.dot(
                    tl.trans(grad.to(values.dtype)), values, fc2_grad, input_precision="ieee"
                )
            first += BM
        both = known[:, None] & inside[None, :]
        tl.store(part + (e * rank + c)[:, None] * hidden + n[None, :], fc2_grad, both)
        both = inside[:, None] & known[None, :]
        tl.store(part + matrix + (e * hidden + n)[:, None] * rank + c[None, :], fc1_grad, both)
        if group % chunks == 0:
            tl.store(part + biases + e * rank + c, fc2_bias_grad, known)
        if tl.program_id(0) == 0:
            tl.store(part + biases + EXPERTS * rank + e * hidden + n, fc1_bias_grad, inside)
    elif group < EXPERTS * chunks + attributes:
        a = group - EXPERTS * chunks
        j = tl.arange(0, EP2)
        acc = tl.zeros([EP2, BC], tl.float32)
        tokens_per_split = tl.cdiv(per_split, attributes)
        first = split.to(tl.int64) * tokens_per_split
        end = tl.minimum(first + tokens_per_split, tokens)
        while first < end:
            t = first + tl.arange(0, BM)
            row = t * attributes + a
            z = z_chunk(normed, gamma, beta, row, t < end, c, rank, router_grad)
            full = (t < end)[:, None] & (j < 2 * EXPERTS)[None, :]
            inner = tl.load(router_grad + row[:, None] * (2 * EXPERTS) + j[None, :], full, 0.0)
            acc = tl.dot(tl.trans(inner), z, acc, input_precision="ieee")
            first += BM
        to = router + (a * 2 * EXPERTS + j)[:, None] * rank + c[None, :]
        tl.store(part + to, acc, (j < 2 * EXPERTS)[:, None] & known[None, :])
    else:
        for plane in tl.static_range(4):
            acc = tl.zeros([BM, BC], tl.float32)
            first = split * tiles_per_split
            end = tl.minimum(first + tiles_per_split, tiles)
            while first < end:
                tile = first + tl.arange(0, BM)
                to = (tile[:, None].to(tl.int64) * 4 + plane) * rank + c[None, :]
                acc += tl.load(norm_partial + to, (tile < end)[:, None] & known[None, :], 0.0)
                first += BM
            tl.store(part + norms + plane * rank + c, tl.sum(acc, 0), known)


@triton.jit
def _sum_parts(parts, at, inside, splits, SIZE: tl.constexpr):
    acc = tl.load(parts + at, inside, 0.0)
    split = splits * 0 + 1
    while split < splits:
        acc += tl.load(parts + split.to(tl.int64) * SIZE + at, inside, 0.0)
        split += 1
    return acc


@triton.jit
def _put(target, at, value, inside):
    if target is not None:
        tl.store(target + at, value.to(target.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "splits", "x_programs"])
def finish(
    x, scaler, norm1_weight, norm1_bias, down, up, row_terms, parts, up_products, down_products,
    x_grad, scaler_grad, norm1_weight_grad, norm1_bias_grad, down_grad, norm2_weight_grad,
    norm2_bias_grad, gate_grad, gate_noise_grad, fc1_weight_grad, fc1_bias_grad, fc2_weight_grad,
    fc2_bias_grad, up_grad,
    rows, splits, x_programs,
    part_programs: tl.constexpr, down_programs: tl.constexpr, norm_programs: tl.constexpr,
    attributes: tl.constexpr, width: tl.constexpr, out: tl.constexpr, rank: tl.constexpr,
    hidden: tl.constexpr, EXPERTS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BJ: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The end, in five roles: norm1's share of x's gradient; the splits' sums added up; the
    gradients of `down`, of norm1, and of `up` and `scaler` from the vendor's products."""
    matrix: tl.constexpr = EXPERTS * rank * hidden
    biases: tl.constexpr = 2 * matrix
    router: tl.constexpr = biases + EXPERTS * (rank + hidden)
    norms: tl.constexpr = router + attributes * 2 * EXPERTS * rank
    pid = tl.program_id(0)
    if pid < x_programs:
        if x_grad is not None:
            at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            row = at // width
            inside = row < rows
            slope = tl.load(row_terms + 2 * row, inside, 0.0)
            offset = tl.load(row_terms + 2 * row + 1, inside, 0.0)
            grad = tl.load(x_grad + at, inside, 0.0).to(tl.float32)
            grad += slope * tl.load(x + at, inside, 0.0).to(tl.float32) + offset
            tl.store(x_grad + at, grad.to(x_grad.dtype.element_ty), inside)
    elif pid < x_programs + part_programs:
        at = (pid - x_programs) * BLOCK + tl.arange(0, BLOCK)
        total = _sum_parts(parts, at, at < norms + 2 * rank, splits, SIZE)
        _put(fc2_weight_grad, at, total, at < matrix)
        _put(fc1_weight_grad, at - matrix, total, (at >= matrix) & (at < biases))
        low = at - biases
        _put(fc2_bias_grad, low, total, (low >= 0) & (low < EXPERTS * rank))
        low -= EXPERTS * rank
        _put(fc1_bias_grad, low, total, (low >= 0) & (low < EXPERTS * hidden))
        # [A, 2 E, r] to two [A, r, E]
        low = at - router
        inside = (low >= 0) & (low < attributes * 2 * EXPERTS * rank)
        e = low // rank % (2 * EXPERTS)
        to = (low // (rank * 2 * EXPERTS) * rank + low % rank) * EXPERTS + e % EXPERTS
        _put(gate_grad, to, total, inside & (e < EXPERTS))
        _put(gate_noise_grad, to, total, inside & (e >= EXPERTS))
        low = at - norms
        _put(norm2_weight_grad, low, total, (low >= 0) & (low < rank))
        _put(norm2_bias_grad, low - rank, total, (low >= rank) & (low < 2 * rank))
    elif pid < x_programs + part_programs + down_programs:
        if down_grad is not None:
            j = pid - x_programs - part_programs
            z0 = _sum_parts(parts, norms + 2 * rank + j, True, splits, SIZE)
            means = _sum_parts(parts, norms + 3 * rank + j, True, splits, SIZE)
            for k0 in range(0, width, BLOCK):
                k = k0 + tl.arange(0, BLOCK)
                inside = k < width
                to = j.to(tl.int64) * width + k
                scale = tl.load(norm1_weight + k, inside, 0.0).to(tl.float32)
                offset = tl.load(norm1_bias + k, inside, 0.0).to(tl.float32)
                product = tl.load(down_products + to, inside, 0.0)
                _put(down_grad, to, scale * (product - means) + offset * z0, inside)
    elif pid < x_programs + part_programs + down_programs + norm_programs:
        if down_products is not None:
            k = (pid - x_programs - part_programs - down_programs) * BW + tl.arange(0, BW)
            weight_sum = tl.zeros([BW], tl.float32)
            bias_sum = tl.zeros([BW], tl.float32)
            for j0 in range(0, rank, BJ):
                j = j0 + tl.arange(0, BJ)
                z0 = _sum_parts(parts, norms + 2 * rank + j, j < rank, splits, SIZE)
                means = _sum_parts(parts, norms + 3 * rank + j, j < rank, splits, SIZE)
                inside = (j < rank)[:, None] & (k < width)[None, :]
                to = j[:, None].to(tl.int64) * width + k[None, :]
                weight = tl.load(down + to, inside, 0.0).to(tl.float32)
                product = tl.load(down_products + to, inside, 0.0)
                weight_sum += tl.sum((product - means[:, None]) * weight, 0)
                bias_sum += tl.sum(z0[:, None] * weight, 0)
            _put(norm1_weight_grad, k, weight_sum, k < width)
            _put(norm1_bias_grad, k, bias_sum, k < width)
    else:
        if up_products is not None:
            o = pid - x_programs - part_programs - down_programs - norm_programs
            for a in range(attributes):
                acc = tl.zeros([BLOCK], tl.float32)
                for j0 in range(0, rank, BLOCK):
                    j = j0 + tl.arange(0, BLOCK)
                    to = o.to(tl.int64) * rank + j
                    product = tl.load(up_products + a * out * rank + to, j < rank, 0.0)
                    acc += product * tl.load(up + to, j < rank, 0.0).to(tl.float32)
                if scaler_grad is not None:
                    total = tl.sum(acc, 0).to(scaler_grad.dtype.element_ty)
                    tl.store(scaler_grad + a * out + o, total)
            if up_grad is not None:
                for j0 in range(0, rank, BLOCK):
                    j = j0 + tl.arange(0, BLOCK)
                    to = o.to(tl.int64) * rank + j
                    acc = tl.zeros([BLOCK], tl.float32)
                    for a in range(attributes):
                        scale = tl.load(scaler + a * out + o).to(tl.float32)
                        acc += scale * tl.load(up_products + a * out * rank + to, j < rank, 0.0)
                    _put(up_grad, to, acc, j < rank)
