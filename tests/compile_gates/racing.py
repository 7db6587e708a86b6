"""A product and row sums of its first operand, loaded for both or for each: what the gate tells."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_and_sums(x, weight, out, sums, width: tl.constexpr, APART: tl.constexpr):
    """out [64, 128] = x [64, width] weight [width, 128]; sums [64] of the rows of x."""
    row, column, k = tl.arange(0, 64), tl.arange(0, 128), tl.arange(0, 32)
    acc = tl.zeros([64, 128], tl.float32)
    total = tl.zeros([64, 32], tl.float32)
    for k0 in range(0, width, 32):
        at = x + row[:, None] * width + (k0 + k)[None, :]
        values = tl.load(at)
        total += (tl.load(at, eviction_policy="evict_last") if APART else values).to(tl.float32)
        acc = tl.dot(values, tl.load(weight + (k0 + k)[:, None] * 128 + column[None, :]), acc)
    tl.store(out + row[:, None] * 128 + column[None, :], acc)
    tl.store(sums + row, tl.sum(total, 1))
