"""Triton kernels of the gathers and of the weighted sum: rows of tokens, sums by token.

Widths are compiled in, numbers of tokens and keys are not. Sums over keys, tokens and images have a
fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _moments(rows, here, eps, H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr):
    """Mean and rstd of rows at pointers [BR]."""
    acc = tl.zeros([BR, BH], tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        full = here[:, None] & (h < H)[None, :]
        acc += tl.load(rows[:, None] + h[None, :], full, 0.0).to(tl.float32)
    mean = tl.sum(acc, 1) / H
    acc = tl.zeros([BR, BH], tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        full = here[:, None] & (h < H)[None, :]
        value = tl.load(rows[:, None] + h[None, :], full, 0.0).to(tl.float32)
        centred = tl.where(full, value - mean[:, None], 0.0)
        acc += centred * centred
    return mean, tl.rsqrt(tl.sum(acc, 1) / H + eps)


@triton.jit(do_not_specialize=["total", "keys", "by_image", "by_row"])
def norm_rows(
    tokens, match, weight, bias, out, total, keys, by_image, by_row, eps,
    H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """BR of the `total` normed rows, `keys` an image: the token at match or, where that is None,
    each token. Strides of `tokens` are by_image, by_row and 1."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    here = row < total
    token = row % keys
    if match is not None:
        token = tl.load(match + row, here, 0)
    rows = tokens + (row // keys).to(tl.int64) * by_image + token.to(tl.int64) * by_row
    mean, rstd = _moments(rows, here, eps, H, BR, BH)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        full = here[:, None] & (h < H)[None, :]
        value = tl.load(rows[:, None] + h[None, :], full, 0.0).to(tl.float32)
        scale = tl.load(weight + h, h < H, 0.0).to(tl.float32)
        shift = tl.load(bias + h, h < H, 0.0).to(tl.float32)
        normed = (value - mean[:, None]) * rstd[:, None] * scale[None, :] + shift[None, :]
        tl.store(out + (row.to(tl.int64) * H)[:, None] + h[None, :], normed, full)


@triton.jit(do_not_specialize=["count", "keys"])
def sum_by_token(
    grad, match, summed, count, keys, H: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr
):
    """summed [B, count, H] in float32: of one token the sum of grad [B, keys, H] over its keys."""
    image = (tl.program_id(0) // count).to(tl.int64)
    token = tl.program_id(0) % count
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    acc = tl.zeros([BK, BH], tl.float32)
    k0 = 0
    while k0 < keys:
        k = k0 + tl.arange(0, BK)
        mine = (k < keys) & (tl.load(match + image * keys + k, k < keys, 0) == token)
        at = ((image * keys + k) * H)[:, None] + h[None, :]
        acc += tl.load(grad + at, mine[:, None] & (h < H)[None, :], 0.0).to(tl.float32)
        k0 += BK
    at = (image * count + token) * H + h
    tl.store(summed + at, tl.sum(acc, 0), h < H)


@triton.jit(do_not_specialize=["total", "count", "by_image", "by_row"])
def norm_rows_backward(
    tokens, grad, weight, tokens_grad, parts, total, count, by_image, by_row, eps,
    H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """From grad [total, H], float32, of BR normed rows: of the tokens (None: not wanted), and the
    shares of norm weight and bias, parts [programs, 2, H]."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    here = row < total
    rows = tokens + (row // count).to(tl.int64) * by_image + (row % count).to(tl.int64) * by_row
    at = row.to(tl.int64) * H
    mean, rstd = _moments(rows, here, eps, H, BR, BH)
    sums = tl.zeros([BR, BH], tl.float32)
    along = tl.zeros([BR, BH], tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        full = here[:, None] & (h < H)[None, :]
        value = tl.load(rows[:, None] + h[None, :], full, 0.0).to(tl.float32)
        normed = tl.where(full, (value - mean[:, None]) * rstd[:, None], 0.0)
        upstream = tl.load(grad + at[:, None] + h[None, :], full, 0.0)
        scale = tl.load(weight + h, h < H, 0.0).to(tl.float32)
        part = parts + tl.program_id(0).to(tl.int64) * 2 * H + h
        tl.store(part, tl.sum(upstream * normed, 0), h < H)
        tl.store(part + H, tl.sum(upstream, 0), h < H)
        sums += upstream * scale[None, :]
        along += upstream * scale[None, :] * normed
    if tokens_grad is not None:
        mean_sum = tl.sum(sums, 1) / H
        mean_along = tl.sum(along, 1) / H
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            full = here[:, None] & (h < H)[None, :]
            value = tl.load(rows[:, None] + h[None, :], full, 0.0).to(tl.float32)
            normed = (value - mean[:, None]) * rstd[:, None]
            scaled = tl.load(grad + at[:, None] + h[None, :], full, 0.0)
            scaled *= tl.load(weight + h, h < H, 0.0).to(tl.float32)[None, :]
            out = rstd[:, None] * (scaled - mean_sum[:, None] - normed * mean_along[:, None])
            tl.store(tokens_grad + at[:, None] + h[None, :], out, full)


@triton.jit(do_not_specialize=["count", "mixed", "keys"])
def mix(
    normed, match, mixing, out, count, mixed, keys,
    H: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [B, mixed, H] = mixing [mixed, keys] times the rows of normed [B, count, H] at match."""
    tiles = tl.cdiv(mixed, BT)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    acc = tl.zeros([BT, BH], tl.float32)
    k0 = 0
    while k0 < keys:
        k = k0 + tl.arange(0, BK)
        token = tl.load(match + image * keys + k, k < keys, 0).to(tl.int64)
        left = tl.load(
            mixing + (t.to(tl.int64) * keys)[:, None] + k[None, :],
            (t < mixed)[:, None] & (k < keys)[None, :],
            0.0,
        )
        rows = ((image * count + token) * H)[:, None] + h[None, :]
        right = tl.load(normed + rows, (k < keys)[:, None] & (h < H)[None, :], 0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        k0 += BK
    at = ((image * mixed + t) * H)[:, None] + h[None, :]
    tl.store(out + at, acc, (t < mixed)[:, None] & (h < H)[None, :])


@triton.jit(do_not_specialize=["batch", "count", "mixed", "keys"])
def mix_gradient(
    normed, match, grad, out, batch, count, mixed, keys,
    H: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out [mixed, keys] = the sum over images of grad [B, mixed, H] times the rows of normed at
    match."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    acc = tl.zeros([BT, BK], tl.float32)
    image = batch * 0
    while image < batch:
        first = image.to(tl.int64)
        token = tl.load(match + first * keys + k, k < keys, 0).to(tl.int64)
        for h0 in range(0, H, BH):
            h = h0 + tl.arange(0, BH)
            rows = ((first * mixed + t) * H)[:, None] + h[None, :]
            left = tl.load(grad + rows, (t < mixed)[:, None] & (h < H)[None, :], 0.0)
            columns = ((first * count + token) * H)[None, :] + h[:, None]
            right = tl.load(normed + columns, (h < H)[:, None] & (k < keys)[None, :], 0.0)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        image += 1
    at = (t.to(tl.int64) * keys)[:, None] + k[None, :]
    tl.store(out + at, acc, (t < mixed)[:, None] & (k < keys)[None, :])


@triton.jit(do_not_specialize=["halves"])
def weigh(
    tokens, spatial, spectral, scale, out, halves,
    H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """BR halves of tokens [halves, H], the first and the second half of a token in turn, each plus
    its weight times `scale` times itself."""
    half = tl.program_id(0) * BR + tl.arange(0, BR)
    here = half < halves
    factor = _factor(spatial, spectral, scale, half, here)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    full = here[:, None] & (h < H)[None, :]
    at = (half.to(tl.int64) * H)[:, None] + h[None, :]
    value = tl.load(tokens + at, full, 0.0).to(tl.float32)
    tl.store(out + at, value + factor[:, None] * value, full)


@triton.jit
def _weight(spatial, spectral, half, here):
    first = half % 2 == 0
    upper = tl.load(spatial + half // 2, here & first, 0.0).to(tl.float32)
    lower = tl.load(spectral + half // 2, here & (half % 2 == 1), 0.0).to(tl.float32)
    return tl.where(first, upper, lower)


@triton.jit
def _factor(spatial, spectral, scale, half, here):
    return tl.load(scale).to(tl.float32) * _weight(spatial, spectral, half, here)


@triton.jit(do_not_specialize=["halves"])
def weigh_backward(
    tokens, spatial, spectral, scale, grad, tokens_grad, spatial_grad, spectral_grad, parts, halves,
    H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Of BR halves: gradients of tokens (None: not wanted) and of their weights, and the shares of
    `scale`, parts [halves]."""
    half = tl.program_id(0) * BR + tl.arange(0, BR)
    here = half < halves
    factor = _factor(spatial, spectral, scale, half, here)
    acc = tl.zeros([BR, BH], tl.float32)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        full = here[:, None] & (h < H)[None, :]
        at = (half.to(tl.int64) * H)[:, None] + h[None, :]
        upstream = tl.load(grad + at, full, 0.0).to(tl.float32)
        acc += upstream * tl.load(tokens + at, full, 0.0).to(tl.float32)
        if tokens_grad is not None:
            tl.store(tokens_grad + at, upstream + factor[:, None] * upstream, full)
    dot = tl.sum(acc, 1)
    scaled = dot * tl.load(scale).to(tl.float32)
    tl.store(spatial_grad + half // 2, scaled, here & (half % 2 == 0))
    tl.store(spectral_grad + half // 2, scaled, here & (half % 2 == 1))
    tl.store(parts + half, dot * _weight(spatial, spectral, half, here), here)
