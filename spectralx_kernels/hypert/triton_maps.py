"""Triton kernels of the passes between the stem's convolutions.

Maps are channels-last, [rows, C]. A tile is rows by channels, [BR, BC]. A table [4, C] holds mean,
variance, scale and shift of z = (x - mean) * scale + shift; where NORM is off, z = x.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels._triton_gelu import below, gelu_slope


@triton.jit
def columns(table, c, there, C: tl.constexpr):
    """Mean, scale and shift [1, BC]."""
    mean = tl.load(table + c, there, 0.0)
    scale = tl.load(table + 2 * C + c, there, 0.0)
    shift = tl.load(table + 3 * C + c, there, 0.0)
    return mean[None, :], scale[None, :], shift[None, :]


@triton.jit
def addresses(row, end, c, there, C: tl.constexpr, BR: tl.constexpr):
    """Places [BR, BC] of channels c in BR rows from `row` on, and which of them there are."""
    r = row + tl.arange(0, BR)
    return r.to(tl.int64)[:, None] * C + c[None, :], (r < end)[:, None] & there[None, :]


@triton.jit
def wide(x, at, full):
    """x at those places in float32."""
    return tl.load(x + at, full, 0.0).to(tl.float32)


@triton.jit
def through(grad, z, GELU: tl.constexpr):
    """Gradient of z for that of GELU(z)."""
    if GELU:
        grad *= gelu_slope(z)
    return grad


@triton.jit(do_not_specialize=["rows", "span"])
def add_moments(
    x, parts, table, rows, span, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """parts [programs, 2, C]: sums of x - near and of its square over `span` rows.

    `near` is the mean of the first rows, which goes into the table in the mean's place: a single
    row may lie several deviations aside, and the variance be a small difference then.
    """
    program, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < C
    at, full = addresses(0, rows, c, there, C, BR)
    near = tl.sum(wide(x, at, full), 0) / tl.minimum(rows, BR)
    if program == 0:
        tl.store(table + c, near, there)
    one, two = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    row = program * span
    end = tl.minimum(row + span, rows)
    while row < end:
        at, full = addresses(row, end, c, there, C, BR)
        d = tl.where(full, wide(x, at, full) - near[None, :], 0.0)
        one += tl.sum(d, 0)
        two += tl.sum(d * d, 0)
        row += BR
    to = parts + program.to(tl.int64) * 2 * C + c
    tl.store(to, one, there)
    tl.store(to + C, two, there)


@triton.jit(do_not_specialize=["rows", "span"])
def add_gradients(
    grad, x, table, parts, rows, span, C: tl.constexpr, GELU: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """parts [programs, 2, C]: sums of dz (x - mean) and of dz over `span` rows."""
    program, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < C
    mean, scale, shift = columns(table, c, there, C)
    one, two = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    row = program * span
    end = tl.minimum(row + span, rows)
    while row < end:
        at, full = addresses(row, end, c, there, C, BR)
        d = wide(x, at, full) - mean
        dz = through(wide(grad, at, full), d * scale + shift, GELU)
        one += tl.sum(tl.where(full, dz * d, 0.0), 0)
        two += tl.sum(tl.where(full, dz, 0.0), 0)
        row += BR
    to = parts + program.to(tl.int64) * 2 * C + c
    tl.store(to, one, there)
    tl.store(to + C, two, there)


@triton.jit
def _totals(parts, c, there, programs, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """Both sums [BC] over all programs, in order."""
    one, two = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    program = 0
    while program < programs:
        p = program + tl.arange(0, BP)
        full = (p < programs)[:, None] & there[None, :]
        at = p.to(tl.int64)[:, None] * 2 * C + c[None, :]
        one += tl.sum(tl.load(parts + at, full, 0.0), 0)
        two += tl.sum(tl.load(parts + at + C, full, 0.0), 0)
        program += BP
    return one, two


@triton.jit(do_not_specialize=["rows", "programs"])
def make_table(
    parts, weight, bias, table, rows, programs, eps, C: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """The table of a batch norm from what `add_moments` left."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    one, two = _totals(parts, c, there, programs, C, BP, BC)
    off = one / rows
    variance = two / rows - off * off
    variance = tl.where(variance < 0.0, 0.0, variance)  # NaN stays
    scale = tl.load(weight + c, there, 0.0).to(tl.float32) / tl.sqrt(variance + eps)
    tl.store(table + c, tl.load(table + c, there, 0.0) + off, there)
    tl.store(table + C + c, variance, there)
    tl.store(table + 2 * C + c, scale, there)
    tl.store(table + 3 * C + c, tl.load(bias + c, there, 0.0).to(tl.float32), there)


@triton.jit(do_not_specialize=["programs"])
def make_gradients(
    parts, table, both, programs, eps, C: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """both [2, C]: gradients of weight and bias, from the parts of `add_gradients`."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    one, two = _totals(parts, c, there, programs, C, BP, BC)
    variance = tl.load(table + C + c, there, 0.0)
    tl.store(both + c, one / tl.sqrt(variance + eps), there)
    tl.store(both + C + c, two, there)


@triton.jit(do_not_specialize=["rows"])
def apply(
    x, table, skip, out, rows, C: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = z, or skip + GELU(z)."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < C
    at, full = addresses(tl.program_id(0) * BR, rows, c, there, C, BR)
    z = wide(x, at, full)
    if NORM:
        mean, scale, shift = columns(table, c, there, C)
        z = (z - mean) * scale + shift
    if GELU:
        z = wide(skip, at, full) + z * below(z)
    tl.store(out + at, z.to(out.dtype.element_ty), full)


@triton.jit(do_not_specialize=["rows"])
def gradient(
    grad, x, table, both, out, rows, eps, C: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of x for that of what `apply` gave; both [2, C] from `make_gradients`."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    there = c < C
    at, full = addresses(tl.program_id(0) * BR, rows, c, there, C, BR)
    value = wide(x, at, full)
    upstream = wide(grad, at, full)
    if NORM:
        mean, scale, shift = columns(table, c, there, C)
        d = value - mean
        variance = tl.load(table + C + c, there, 1.0)[None, :]
        of_weight = tl.load(both + c, there, 0.0)[None, :]
        of_bias = tl.load(both + C + c, there, 0.0)[None, :]
        dz = through(upstream, d * scale + shift, GELU)
        result = scale * (dz - (of_bias + d / tl.sqrt(variance + eps) * of_weight) / rows)
    else:
        result = through(upstream, value, GELU)
    tl.store(out + at, result.to(out.dtype.element_ty), full)
