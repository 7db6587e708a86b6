"""Triton kernels that end AoMoA's backward: the gradients of the weights, and norm1.

A kernel of several roles calls a function for each. Sums over rows go by fixed splits, which
`finish` adds up in their order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.aomoa.triton_backward import output_grad
from spectralx_kernels.aomoa.triton_dense import LOG2_E, fast_log2
from spectralx_kernels.aomoa.triton_mixture import any_row, z_chunk


@triton.jit
def _expert(
    normed, gamma, beta, gates, fc2, fc2_bias, combined, mixed_grad, hidden_rows, hidden_grad,
    part, tokens, first, end, e, n0, c,
    attributes: tl.constexpr, rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """fc1 and fc2 of expert e with their biases: hidden rows n0 on, columns c."""
    matrix: tl.constexpr = EXPERTS * rank * hidden
    biases: tl.constexpr = 2 * matrix
    n = n0 + tl.arange(0, BH)
    inside = n < hidden
    known = c < rank
    fc1_grad = tl.zeros([BH, BC], tl.float32)
    fc2_grad = tl.zeros([BC, BH], tl.float32)
    fc1_bias_grad = tl.zeros([BH], tl.float32)
    fc2_bias_grad = tl.zeros([BC], tl.float32)
    while first < end:
        row = first + tl.arange(0, BM)
        place = row % attributes * tokens + row // attributes
        gate = tl.load(gates + place * EXPERTS + e, row < end, 0.0)
        taken = gate != 0
        if any_row(taken):
            z = z_chunk(normed, gamma, beta, row, taken, c, rank).to(hidden_grad.dtype.element_ty)
            to = (row[:, None] * EXPERTS + e) * hidden + n[None, :]
            full = taken[:, None] & inside[None, :]
            inner = tl.load(hidden_grad + to, full, 0.0)
            values = tl.load(hidden_rows + to, full, 0.0)
            grad = output_grad(
                hidden_rows, fc2, fc2_bias, combined, mixed_grad, e, gate, taken, row, place, c,
                rank, hidden, EXPERTS, BM, BC, BH,
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
    if n0 == 0:
        tl.store(part + biases + e * rank + c, fc2_bias_grad, known)
    if tl.program_id(0) == 0:
        tl.store(part + biases + EXPERTS * rank + e * hidden + n, fc1_bias_grad, inside)


@triton.jit
def _whole_expert(
    normed, gamma, beta, gates, fc2, fc2_bias, combined, mixed_grad, hidden_rows, hidden_grad,
    part, tokens, first, end, e, c,
    attributes: tl.constexpr, rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """`_expert` where all of the hidden layer is one tile and every expert ran on every row: the
    weights stay, and no load waits for a gate."""
    matrix: tl.constexpr = EXPERTS * rank * hidden
    biases: tl.constexpr = 2 * matrix
    n = tl.arange(0, BH)
    inside = n < hidden
    known = c < rank
    fc2_at = (e * rank + c)[:, None] * hidden + n[None, :]
    weight = tl.load(fc2 + fc2_at, known[:, None] & inside[None, :], 0.0)
    bias = tl.load(fc2_bias + e * rank + c, known, 0.0).to(tl.float32)
    scale = tl.load(gamma + c, known, 0.0).to(tl.float32)
    offset = tl.load(beta + c, known, 0.0).to(tl.float32)
    fc1_grad = tl.zeros([BC, BH], tl.float32)
    fc2_grad = tl.zeros([BC, BH], tl.float32)
    fc1_bias_grad = tl.zeros([BH], tl.float32)
    fc2_bias_grad = tl.zeros([BC], tl.float32)
    i = tl.arange(0, BM)
    while first < end:
        row = first + i
        here = row < end
        place = row % attributes * tokens + row // attributes
        gate = tl.load(gates + place * EXPERTS + e, here, 0.0)
        full = here[:, None] & known[None, :]
        at = i[:, None] * rank + c[None, :]
        value = tl.load(normed + first * rank + at, full, 0.0)
        total = tl.load(combined + first * rank + at, full, 0.0)
        upstream = tl.load(mixed_grad + place[:, None] * rank + c[None, :], full, 0.0)
        full = here[:, None] & inside[None, :]
        at = (first * EXPERTS + e) * hidden + i[:, None] * (EXPERTS * hidden) + n[None, :]
        inner = tl.load(hidden_grad + at, full, 0.0)
        values = tl.load(hidden_rows + at, full, 0.0)
        # A NaN stays out of the experts that its row does not take.
        taken = (gate != 0)[:, None]
        values = tl.where(taken, values, 0.0)
        y = tl.dot(values, tl.trans(weight), input_precision="ieee") + bias[None, :]
        log_gate = fast_log2(tl.where(gate != 0, gate, 1.0))
        power = tl.exp2((y - total) * LOG2_E + log_gate[:, None])
        grad = tl.where(taken, upstream.to(tl.float32) * power, 0.0)
        z = tl.where(taken, value * scale[None, :] + offset[None, :], 0.0)
        fc1_grad = tl.dot(tl.trans(z.to(inner.dtype)), inner, fc1_grad, input_precision="ieee")
        fc1_bias_grad += tl.sum(inner.to(tl.float32), 0)
        fc2_bias_grad += tl.sum(grad, 0)
        fc2_grad = tl.dot(tl.trans(grad.to(values.dtype)), values, fc2_grad, input_precision="ieee")
        first += BM
    both = known[:, None] & inside[None, :]
    tl.store(part + fc2_at, fc2_grad, both)
    tl.store(part + matrix + (e * hidden + n)[None, :] * rank + c[:, None], fc1_grad, both)
    tl.store(part + biases + e * rank + c, fc2_bias_grad, known)
    if tl.program_id(0) == 0:
        tl.store(part + biases + EXPERTS * rank + e * hidden + n, fc1_bias_grad, inside)


@triton.jit
def _router(
    normed, gamma, beta, router_grad, part, first, end, a, c,
    attributes: tl.constexpr, rank: tl.constexpr, EXPERTS: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, EP2: tl.constexpr,
):  # fmt: skip
    """gate and gate_noise of attribute a, tokens `first` to `end`, as [2 E, r]."""
    j = tl.arange(0, EP2)
    acc = tl.zeros([EP2, BC], tl.float32)
    while first < end:
        t = first + tl.arange(0, BM)
        row = t * attributes + a
        z = z_chunk(normed, gamma, beta, row, t < end, c, rank).to(router_grad.dtype.element_ty)
        full = (t < end)[:, None] & (j < 2 * EXPERTS)[None, :]
        inner = tl.load(router_grad + row[:, None] * (2 * EXPERTS) + j[None, :], full, 0.0)
        acc = tl.dot(tl.trans(inner), z, acc, input_precision="ieee")
        first += BM
    to = (a * 2 * EXPERTS + j)[:, None] * rank + c[None, :]
    tl.store(part + to, acc, (j < 2 * EXPERTS)[:, None] & (c < rank)[None, :])


@triton.jit
def _norms(
    norm_partial, part, first, end, c, rank: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """The tiles' sums `first` to `end`, added up by plane."""
    for plane in tl.static_range(4):
        acc = tl.zeros([BM, BC], tl.float32)
        tile = first + tl.arange(0, BM)
        while tl.min(tile, 0) < end:
            to = (tile[:, None].to(tl.int64) * 4 + plane) * rank + c[None, :]
            acc += tl.load(norm_partial + to, (tile < end)[:, None] & (c < rank)[None, :], 0.0)
            tile += BM
        tl.store(part + plane * rank + c, tl.sum(acc, 0), c < rank)


@triton.jit(do_not_specialize=["tokens", "per_split", "tiles", "tiles_per_split"])
def weight_gradients(
    normed, gamma, beta, gates, fc2, fc2_bias, combined, mixed_grad,
    hidden_rows, hidden_grad, router_grad, norm_partial, parts,
    tokens, per_split, tiles, tiles_per_split,
    attributes: tl.constexpr, rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    SIZE: tl.constexpr, DENSE: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr, EP2: tl.constexpr,
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
    router: tl.constexpr = 2 * EXPERTS * rank * hidden + EXPERTS * (rank + hidden)
    norms: tl.constexpr = router + attributes * 2 * EXPERTS * rank
    part = parts + split.to(tl.int64) * SIZE
    if group < EXPERTS * chunks:
        first = split.to(tl.int64) * per_split
        end = tl.minimum(first + per_split, tokens.to(tl.int64) * attributes)
        if DENSE:
            _whole_expert(
                normed, gamma, beta, gates, fc2, fc2_bias, combined, mixed_grad, hidden_rows,
                hidden_grad, part, tokens, first, end, group, c, attributes, rank, hidden, EXPERTS,
                BM, BC, BH,
            )  # fmt: skip
        else:
            _expert(
                normed, gamma, beta, gates, fc2, fc2_bias, combined, mixed_grad, hidden_rows,
                hidden_grad, part, tokens, first, end, group // chunks, group % chunks * BH, c,
                attributes, rank, hidden, EXPERTS, BM, BC, BH,
            )  # fmt: skip
    elif group < EXPERTS * chunks + attributes:
        tokens_per_split = tl.cdiv(per_split, attributes)
        first = split.to(tl.int64) * tokens_per_split
        end = tl.minimum(first + tokens_per_split, tokens.to(tl.int64))
        _router(
            normed, gamma, beta, router_grad, part + router, first, end,
            group - EXPERTS * chunks, c, attributes, rank, EXPERTS, BM, BC, EP2,
        )  # fmt: skip
    else:
        first = split.to(tl.int64) * tiles_per_split
        end = tl.minimum(first + tiles_per_split, tiles.to(tl.int64))
        _norms(norm_partial, part + norms, first, end, c, rank, BM, BC)


@triton.jit
def _sum_parts(parts, at, inside, splits: tl.constexpr, SIZE: tl.constexpr):
    # Unrolled, so that the loads are under way at once; added up in order all the same.
    acc = tl.load(parts + at, inside, 0.0)
    for split in tl.static_range(1, splits):
        acc += tl.load(parts + split * SIZE + at, inside, 0.0)
    return acc


@triton.jit
def _put(target, at, value, inside):
    if target is not None:
        tl.store(target + at, value.to(target.dtype.element_ty), inside)


@triton.jit
def _finish_x(x, row_terms, x_grad, pid, rows, width: tl.constexpr, BLOCK: tl.constexpr):
    """Adds norm1's share of x's gradient."""
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = at // width
    inside = row < rows
    slope = tl.load(row_terms + 2 * row, inside, 0.0)
    offset = tl.load(row_terms + 2 * row + 1, inside, 0.0)
    grad = tl.load(x_grad + at, inside, 0.0).to(tl.float32)
    grad += slope * tl.load(x + at, inside, 0.0).to(tl.float32) + offset
    tl.store(x_grad + at, grad.to(x_grad.dtype.element_ty), inside)


@triton.jit
def _finish_parts(
    parts, norm2_weight_grad, norm2_bias_grad, gate_grad, gate_noise_grad, fc1_weight_grad,
    fc1_bias_grad, fc2_weight_grad, fc2_bias_grad, pid, splits: tl.constexpr,
    attributes: tl.constexpr, rank: tl.constexpr, hidden: tl.constexpr, EXPERTS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the splits up, for all that is then finished."""
    matrix: tl.constexpr = EXPERTS * rank * hidden
    biases: tl.constexpr = 2 * matrix
    router: tl.constexpr = biases + EXPERTS * (rank + hidden)
    norms: tl.constexpr = router + attributes * 2 * EXPERTS * rank
    at = pid * BLOCK + tl.arange(0, BLOCK)
    total = _sum_parts(parts, at, at < norms + 2 * rank, splits, SIZE)
    _put(fc2_weight_grad, at, total, at < matrix)
    _put(fc1_weight_grad, at - matrix, total, (at >= matrix) & (at < biases))
    fc2_at = at - biases
    _put(fc2_bias_grad, fc2_at, total, (fc2_at >= 0) & (fc2_at < EXPERTS * rank))
    fc1_at = fc2_at - EXPERTS * rank
    _put(fc1_bias_grad, fc1_at, total, (fc1_at >= 0) & (fc1_at < EXPERTS * hidden))
    # [A, 2 E, r] to two [A, r, E]
    low = at - router
    inside = (low >= 0) & (at < norms)
    e = low // rank % (2 * EXPERTS)
    to = (low // (rank * 2 * EXPERTS) * rank + low % rank) * EXPERTS + e % EXPERTS
    _put(gate_grad, to, total, inside & (e < EXPERTS))
    _put(gate_noise_grad, to, total, inside & (e >= EXPERTS))
    low = at - norms
    _put(norm2_weight_grad, low, total, (low >= 0) & (low < rank))
    _put(norm2_bias_grad, low - rank, total, (low >= rank) & (low < 2 * rank))


@triton.jit
def _finish_down(
    parts, norm1_weight, norm1_bias, down_products, down_grad, j, splits: tl.constexpr,
    norms: tl.constexpr, width: tl.constexpr, rank: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row j of down: gamma (product - sum of normed_grad mean1) + beta sum of z0's gradient."""
    z0 = _sum_parts(parts, norms + 2 * rank + j, j < rank, splits, SIZE)
    means = _sum_parts(parts, norms + 3 * rank + j, j < rank, splits, SIZE)
    for k0 in range(0, width, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        to = j * width + k
        scale = tl.load(norm1_weight + k, k < width, 0.0).to(tl.float32)
        offset = tl.load(norm1_bias + k, k < width, 0.0).to(tl.float32)
        product = tl.load(down_products + to, k < width, 0.0)
        _put(down_grad, to, scale * (product - means) + offset * z0, k < width)


@triton.jit
def _finish_norm(
    parts, down, down_products, norm1_weight_grad, norm1_bias_grad, pid, splits: tl.constexpr,
    norms: tl.constexpr, width: tl.constexpr, rank: tl.constexpr,
    SIZE: tl.constexpr, BJ: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BW columns of norm1's gradients."""
    k = pid * BW + tl.arange(0, BW)
    weight_sum = tl.zeros([BW], tl.float32)
    bias_sum = tl.zeros([BW], tl.float32)
    for j0 in range(0, rank, BJ):
        j = j0 + tl.arange(0, BJ)
        z0 = _sum_parts(parts, norms + 2 * rank + j, j < rank, splits, SIZE)
        means = _sum_parts(parts, norms + 3 * rank + j, j < rank, splits, SIZE)
        inside = (j < rank)[:, None] & (k < width)[None, :]
        to = j[:, None] * width + k[None, :]
        weight = tl.load(down + to, inside, 0.0).to(tl.float32)
        product = tl.load(down_products + to, inside, 0.0)
        weight_sum += tl.sum((product - means[:, None]) * weight, 0)
        bias_sum += tl.sum(z0[:, None] * weight, 0)
    _put(norm1_weight_grad, k, weight_sum, k < width)
    _put(norm1_bias_grad, k, bias_sum, k < width)


@triton.jit
def _finish_up(
    up, scaler, up_products, up_grad, scaler_grad, o,
    attributes: tl.constexpr, out: tl.constexpr, rank: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row o of up, and scaler at o in every attribute."""
    row = o * rank
    if scaler_grad is not None:
        for a in range(attributes):
            sums = tl.zeros([BLOCK], tl.float32)
            for j0 in range(0, rank, BLOCK):
                j = j0 + tl.arange(0, BLOCK)
                product = tl.load(up_products + a * out * rank + row + j, j < rank, 0.0)
                sums += product * tl.load(up + row + j, j < rank, 0.0).to(tl.float32)
            tl.store(scaler_grad + a * out + o, tl.sum(sums, 0).to(scaler_grad.dtype.element_ty))
    if up_grad is not None:
        for j0 in range(0, rank, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            acc = tl.zeros([BLOCK], tl.float32)
            for a in range(attributes):
                scale = tl.load(scaler + a * out + o).to(tl.float32)
                acc += scale * tl.load(up_products + a * out * rank + row + j, j < rank, 0.0)
            tl.store(up_grad + row + j, acc.to(up_grad.dtype.element_ty), j < rank)


@triton.jit(do_not_specialize=["rows", "x_programs"])
def finish(
    x, scaler, norm1_weight, norm1_bias, down, up, row_terms, parts, up_products, down_products,
    x_grad, scaler_grad, norm1_weight_grad, norm1_bias_grad, down_grad, norm2_weight_grad,
    norm2_bias_grad, gate_grad, gate_noise_grad, fc1_weight_grad, fc1_bias_grad, fc2_weight_grad,
    fc2_bias_grad, up_grad,
    rows, splits: tl.constexpr, x_programs,
    part_programs: tl.constexpr, down_programs: tl.constexpr, norm_programs: tl.constexpr,
    attributes: tl.constexpr, width: tl.constexpr, out: tl.constexpr, rank: tl.constexpr,
    hidden: tl.constexpr, EXPERTS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BJ: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The end, in five roles by program: what is wanted of them."""
    norms: tl.constexpr = (
        2 * EXPERTS * rank * hidden + EXPERTS * (rank + hidden) + attributes * 2 * EXPERTS * rank
    )
    pid = tl.program_id(0)
    if pid < x_programs:
        if x_grad is not None:
            _finish_x(x, row_terms, x_grad, pid, rows, width, BLOCK)
    elif pid < x_programs + part_programs:
        if part_programs > 0:
            _finish_parts(
                parts, norm2_weight_grad, norm2_bias_grad, gate_grad, gate_noise_grad,
                fc1_weight_grad, fc1_bias_grad, fc2_weight_grad, fc2_bias_grad, pid - x_programs,
                splits, attributes, rank, hidden, EXPERTS, SIZE, BLOCK,
            )  # fmt: skip
    elif pid < x_programs + part_programs + down_programs:
        if down_programs > 0:
            _finish_down(
                parts, norm1_weight, norm1_bias, down_products, down_grad,
                pid - x_programs - part_programs, splits, norms, width, rank, SIZE, BLOCK,
            )  # fmt: skip
    elif pid < x_programs + part_programs + down_programs + norm_programs:
        if norm_programs > 0:
            _finish_norm(
                parts, down, down_products, norm1_weight_grad, norm1_bias_grad,
                pid - x_programs - part_programs - down_programs, splits, norms, width, rank,
                SIZE, BJ, BW,
            )  # fmt: skip
    else:
        if up_products is not None:
            _finish_up(
                up, scaler, up_products, up_grad, scaler_grad,
                pid - x_programs - part_programs - down_programs - norm_programs,
                attributes, out, rank, BLOCK,
            )  # fmt: skip
