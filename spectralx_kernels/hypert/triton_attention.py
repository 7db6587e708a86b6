"""Triton kernels of attention within windows, and of queries shared by all images.

A program takes BM queries (or BN keys) of one head of one window, and BV of the head's columns.
Positions of a window are addresses: row and column of the map follow from the place in the window,
and what lies outside the map is masked. Padded positions are all alike: one key, whose weight is
their number, with which sums over keys begin. Sizes are compiled in, the number of images is not.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(
    t, window, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """Position in the map of place t in the window, and whether there is one."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    y = window // across * ROWS + t // COLUMNS
    x = window % across * COLUMNS + t % COLUMNS
    return y * WIDTH + x, (t < ROWS * COLUMNS) & (y < HEIGHT) & (x < WIDTH)


@triton.jit
def _copies(
    window, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """How many positions of the window lie outside the map."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    rows = tl.minimum(HEIGHT - window // across * ROWS, ROWS)
    columns = tl.minimum(WIDTH - window % across * COLUMNS, COLUMNS)
    return ROWS * COLUMNS - rows * columns


@triton.jit
def _product(
    a, a_row, a_here, b, b_row, b_here, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Rows of a times rows of b: [BM, BN] in float32; 0 where there is no row."""
    acc = tl.zeros([BM, BN], tl.float32)
    for c0 in range(0, DIM, BD):
        c = c0 + tl.arange(0, BD)
        left = tl.load(a + a_row[:, None] + c[None, :], a_here[:, None] & (c < DIM)[None, :], 0.0)
        right = tl.load(b + b_row[None, :] + c[:, None], b_here[None, :] & (c < DIM)[:, None], 0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _with_one(
    a, a_row, a_here, b, DIM: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Rows of a times the one row b: [BM]."""
    acc = tl.zeros([BM], tl.float32)
    for c0 in range(0, DIM, BD):
        c = c0 + tl.arange(0, BD)
        left = tl.load(a + a_row[:, None] + c[None, :], a_here[:, None] & (c < DIM)[None, :], 0.0)
        right = tl.load(b + c, c < DIM, 0.0)
        acc += tl.sum(left.to(tl.float32) * right.to(tl.float32)[None, :], 1)
    return acc


@triton.jit
def _rows(base, row, here, c, DIM: tl.constexpr):
    """Columns c of rows."""
    return tl.load(base + row[:, None] + c[None, :], here[:, None] & (c < DIM)[None, :], 0.0)


@triton.jit
def _program(
    HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Head, window, image and tile of this program, and the columns [BV] of the head that it makes.

    Programs: (images x windows x heads, tiles of queries or keys x blocks of columns).
    """
    chunks: tl.constexpr = (DIM + BV - 1) // BV
    windows: tl.constexpr = ((HEIGHT + ROWS - 1) // ROWS) * ((WIDTH + COLUMNS - 1) // COLUMNS)
    head = tl.program_id(0) % HEADS
    window = tl.program_id(0) // HEADS % windows
    image = (tl.program_id(0) // HEADS // windows).to(tl.int64)
    c = tl.program_id(1) % chunks * BV + tl.arange(0, BV)
    return head, window, image, tl.program_id(1) // chunks, c


@triton.jit
def _queries(
    t, window, image, QUERIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of queries t: the row among an image's, whether there is one, and the row among all images'.

    QUERIES: a number of plain rows; 0: the positions of the window.
    """
    if QUERIES > 0:
        place = t
        here = t < QUERIES
        to = image * QUERIES + place
    else:
        place, here = _place(t, window, ROWS, COLUMNS, HEIGHT, WIDTH)
        to = image * HEIGHT * WIDTH + place
    return place, here, to


@triton.jit(do_not_specialize=["q_image"])
def attention(
    q, k, v, padding_k, padding_v, out, scale, q_image, q_row,
    k_image, k_row, HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v."""
    head, window, image, tile, c = _program(HEADS, DIM, ROWS, COLUMNS, HEIGHT, WIDTH, BV)
    t = tile * BM + tl.arange(0, BM)
    place, here, to = _queries(t, window, image, QUERIES, ROWS, COLUMNS, HEIGHT, WIDTH)
    q += image * q_image + head * DIM
    k += image * k_image + head * DIM
    v += image * k_image + head * DIM
    row = place * q_row
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    if padding_k is not None:
        copies = _copies(window, ROWS, COLUMNS, HEIGHT, WIDTH)
        if copies > 0:
            largest = scale * _with_one(q, row, here, padding_k + head * DIM, DIM, BM, BD)
            total += copies
            value = tl.load(padding_v + head * DIM + c, c < DIM, 0.0).to(tl.float32)
            acc += (value * copies)[None, :]
    for n0 in range(0, ROWS * COLUMNS, BN):
        at, known = _place(n0 + tl.arange(0, BN), window, ROWS, COLUMNS, HEIGHT, WIDTH)
        key = at * k_row
        score = scale * _product(q, row, here, k, key, known, DIM, BM, BN, BD)
        score = tl.where(known[None, :], score, float("-inf"))
        highest = tl.max(score, 1)
        highest = tl.where(highest > largest, highest, largest)  # a NaN comes in through the sum
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp(score - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(p, 1)
        value = _rows(v, key, known, c, DIM)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        largest = highest
    tl.store(
        out + (to * (HEADS * DIM) + head * DIM)[:, None] + c[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        here[:, None] & (c < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["q_image", "rows"])
def query_gradient(
    q, k, v, padding_k, padding_v, dout, dq, log_sum, slope, parts, scale, q_image, q_row,
    k_image, k_row, dq_row, rows, HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradient of q, and for `key_gradient` the log of the sum of exponentials and the mean
    gradient of the probabilities [HEADS, rows]. Two sweeps over the keys, as neither is kept.

    parts [programs, 2, HEADS * DIM]: the gradient of the padded position's key and value.
    """
    head, window, image, tile, c = _program(HEADS, DIM, ROWS, COLUMNS, HEIGHT, WIDTH, BV)
    t = tile * BM + tl.arange(0, BM)
    place, here, to = _queries(t, window, image, QUERIES, ROWS, COLUMNS, HEIGHT, WIDTH)
    q += image * q_image + head * DIM
    k += image * k_image + head * DIM
    v += image * k_image + head * DIM
    dout += head * DIM
    row = place * q_row
    upstream = to * (HEADS * DIM)
    chunks: tl.constexpr = (DIM + BV - 1) // BV
    windows: tl.constexpr = ((HEIGHT + ROWS - 1) // ROWS) * ((WIDTH + COLUMNS - 1) // COLUMNS)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    along = tl.zeros([BM], tl.float32)
    padded = tl.zeros([BM], tl.float32)
    padded_grad = tl.zeros([BM], tl.float32)
    copies = 0
    if padding_k is not None:
        copies = _copies(window, ROWS, COLUMNS, HEIGHT, WIDTH)
        if copies > 0:
            padded = scale * _with_one(q, row, here, padding_k + head * DIM, DIM, BM, BD)
            padded_grad = _with_one(dout, upstream, here, padding_v + head * DIM, DIM, BM, BD)
            largest = padded
            total += copies
            along = padded_grad * copies
    for n0 in range(0, ROWS * COLUMNS, BN):
        at, known = _place(n0 + tl.arange(0, BN), window, ROWS, COLUMNS, HEIGHT, WIDTH)
        key = at * k_row
        score = scale * _product(q, row, here, k, key, known, DIM, BM, BN, BD)
        score = tl.where(known[None, :], score, float("-inf"))
        highest = tl.max(score, 1)
        highest = tl.where(highest > largest, highest, largest)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp(score - base[:, None])
        shrink = tl.exp(largest - base)
        grad = _product(dout, upstream, here, v, key, known, DIM, BM, BN, BD)
        total = total * shrink + tl.sum(p, 1)
        along = along * shrink + tl.sum(p * grad, 1)
        largest = highest
    along = along / total
    log_total = largest + tl.log(total)
    if tl.program_id(1) % chunks == 0:  # the other blocks of columns have found the same
        tl.store(log_sum + head.to(tl.int64) * rows + to, log_total, here)
        tl.store(slope + head.to(tl.int64) * rows + to, along, here)
    acc = tl.zeros([BM, BV], tl.float32)
    for n0 in range(0, ROWS * COLUMNS, BN):
        at, known = _place(n0 + tl.arange(0, BN), window, ROWS, COLUMNS, HEIGHT, WIDTH)
        key = at * k_row
        score = scale * _product(q, row, here, k, key, known, DIM, BM, BN, BD)
        p = tl.where(known[None, :], tl.exp(score - log_total[:, None]), 0.0)
        grad = _product(dout, upstream, here, v, key, known, DIM, BM, BN, BD)
        dscore = p * (grad - along[:, None]) * scale
        value = _rows(k, key, known, c, DIM)
        acc = tl.dot(dscore.to(value.dtype), value, acc, input_precision="ieee")
    if padding_k is not None:  # noqa: SIM102 - one is compiled in, the other is not
        if copies > 0:
            p_one = tl.where(here, copies * tl.exp(padded - log_total), 0.0)
            dscore_one = tl.where(here, p_one * (padded_grad - along) * scale, 0.0)
            key_one = tl.load(padding_k + head * DIM + c, c < DIM, 0.0).to(tl.float32)
            acc += dscore_one[:, None] * key_one[None, :]
            q_tile = _rows(q, row, here, c, DIM).to(tl.float32)
            dout_tile = _rows(dout, upstream, here, c, DIM).to(tl.float32)
            tiles = tl.num_programs(1) // chunks
            part = (image * windows + window) * tiles + tile
            slot = parts + part * (2 * HEADS * DIM) + head * DIM + c
            tl.store(slot, tl.sum(dscore_one[:, None] * q_tile, 0), c < DIM)
            tl.store(slot + HEADS * DIM, tl.sum(p_one[:, None] * dout_tile, 0), c < DIM)
    tl.store(
        dq + (to * dq_row + head * DIM)[:, None] + c[None, :],
        acc.to(dq.dtype.element_ty),
        here[:, None] & (c < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["q_image", "rows"])
def key_gradient(
    q, k, v, dout, dk, dv, log_sum, slope, scale, q_image, q_row,
    k_image, k_row, rows, HEADS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The gradients of k and v, with strides like theirs; their sum to dk where dv is None."""
    head, window, image, tile, c = _program(HEADS, DIM, ROWS, COLUMNS, HEIGHT, WIDTH, BV)
    n = tile * BN + tl.arange(0, BN)
    at, known = _place(n, window, ROWS, COLUMNS, HEIGHT, WIDTH)
    key = at * k_row
    q += image * q_image + head * DIM
    k += image * k_image + head * DIM
    v += image * k_image + head * DIM
    dout += head * DIM
    key_acc = tl.zeros([BN, BV], tl.float32)
    value_acc = tl.zeros([BN, BV], tl.float32)
    count: tl.constexpr = QUERIES if QUERIES > 0 else ROWS * COLUMNS
    for t0 in range(0, count, BM):
        t = t0 + tl.arange(0, BM)
        place, here, to = _queries(t, window, image, QUERIES, ROWS, COLUMNS, HEIGHT, WIDTH)
        row = place * q_row
        upstream = to * (HEADS * DIM)
        log_total = tl.load(log_sum + head.to(tl.int64) * rows + to, here, 0.0)
        along = tl.load(slope + head.to(tl.int64) * rows + to, here, 0.0)
        score = scale * _product(k, key, known, q, row, here, DIM, BN, BM, BD)
        p = tl.where(here[None, :], tl.exp(score - log_total[None, :]), 0.0)
        grad = _product(v, key, known, dout, upstream, here, DIM, BN, BM, BD)
        dscore = p * (grad - along[None, :]) * scale
        query = _rows(q, row, here, c, DIM)
        key_acc = tl.dot(dscore.to(query.dtype), query, key_acc, input_precision="ieee")
        value = _rows(dout, upstream, here, c, DIM)
        value_acc = tl.dot(p.to(value.dtype), value, value_acc, input_precision="ieee")
    to_key = image * k_image + key + head * DIM
    full = known[:, None] & (c < DIM)[None, :]
    if dv is None:
        key_acc += value_acc
    else:
        tl.store(dv + to_key[:, None] + c[None, :], value_acc.to(dv.dtype.element_ty), full)
    tl.store(dk + to_key[:, None] + c[None, :], key_acc.to(dk.dtype.element_ty), full)
