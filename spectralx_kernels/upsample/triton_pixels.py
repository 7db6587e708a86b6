"""Triton kernels of loss, prediction and counts: pixels of the upsampled logits, one at a time.

A tile is classes by pixels, [BK, BP]; nothing of [B, K, H, W] is written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.upsample.triton_axis import begin, place

_AXES = [
    f"{axis}_{part}" for axis in "yx" for part in ("a", "b", "d", "length", "step", "size")
]  # fmt: skip
_NONE = tl.constexpr(2**30)  # past every class


@triton.jit
def upsampled(image, k, first_row, second_row, y_weight, first, second, x_weight, full,
              plane, width, COPY: tl.constexpr):  # fmt: skip
    """Logits [BK, BP] of classes k; rows and columns [BP] of the sources."""
    base = image + (k.to(tl.int64) * plane)[:, None]
    value = tl.load(base + (first_row * width + first)[None, :], full, 0.0).to(tl.float32)
    if not COPY:
        right = tl.load(base + (first_row * width + second)[None, :], full, 0.0).to(tl.float32)
        left = tl.load(base + (second_row * width + first)[None, :], full, 0.0).to(tl.float32)
        last = tl.load(base + (second_row * width + second)[None, :], full, 0.0).to(tl.float32)
        upper = (1.0 - x_weight)[None, :] * value + x_weight[None, :] * right
        lower = (1.0 - x_weight)[None, :] * left + x_weight[None, :] * last
        value = (1.0 - y_weight)[None, :] * upper + y_weight[None, :] * lower
    return value


@triton.jit
def label_of(target, at, here, ignore_index, K: tl.constexpr):
    """The class of pixels, -1 where there is none to count, and whether their label is wrong."""
    label = tl.load(target + at, here, 0).to(tl.int64)
    counts = here & (label != ignore_index)
    known = (label >= 0) & (label < K)
    return tl.where(counts & known, label, -1).to(tl.int32), counts & (known == 0)


@triton.jit
def total_weight(weight, K: tl.constexpr, BK: tl.constexpr):
    acc = tl.zeros([BK], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        acc += tl.load(weight + k, k < K, 0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=[*_AXES, "ignore_index", "pixels"])
def score(
    logits, target, weight, parts, losses, peaks, log_sums, label, probability,
    ignore_index, pixels, y_a, y_b, y_d, y_length, y_step, y_size,
    x_a, x_b, x_d, x_length, x_step, x_size, hot_share, smooth_share,
    K: tl.constexpr, SMOOTHED: tl.constexpr, COPY: tl.constexpr, BK: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """Of BP pixels of an image, what is asked for: label, probability, losses [B, H, W], their sum
    and that of the class weights [programs, 2], and largest logit and logarithm of the sum of
    exponentials under it [B, H, W]."""
    blocks = tl.cdiv(pixels, BP)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    here = pixel < pixels
    at = image * pixels + pixel
    first_row, second_row, y_weight = place(pixel // x_size, y_a, y_b, y_d, y_length, y_step)
    first, second, x_weight = place(pixel % x_size, x_a, x_b, x_d, x_length, x_step)
    plane = y_length * x_length
    base = logits + image * K * plane

    peak = tl.full([BP], float("-inf"), tl.float32)
    best = tl.zeros([BP], tl.int32)
    nan = tl.full([BP], _NONE, tl.int32)  # the first class that is NaN
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        full = (k < K)[:, None] & here[None, :]
        u = upsampled(base, k, first_row, second_row, y_weight, first, second, x_weight, full,
                      plane, x_length, COPY)  # fmt: skip
        nan = tl.minimum(nan, tl.min(tl.where(full & (u != u), k[:, None], _NONE), 0))
        u = tl.where(full & (u == u), u, float("-inf"))
        largest = tl.max(u, 0)
        place_of = tl.min(tl.where(u == largest[None, :], k[:, None], _NONE), 0)
        best = tl.where(largest > peak, place_of, best)
        peak = tl.maximum(peak, largest)
    best = tl.where(nan < _NONE, nan, best)
    if label is not None:
        tl.store(label + at, best.to(tl.int64), here)
    if (
        parts is not None or losses is not None or peaks is not None or probability is not None
    ):  # fmt: skip
        hot = tl.full([BP], -1, tl.int32)
        wrong = here & (pixel < 0)
        if target is not None:
            hot, wrong = label_of(target, at, here, ignore_index, K)
        acc = tl.where(here, 0.0, 1.0)
        peak = tl.where(here, peak, 0.0)
        hot_logit = tl.zeros([BP], tl.float32)
        smooth = tl.zeros([BP], tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            full = (k < K)[:, None] & here[None, :]
            u = upsampled(base, k, first_row, second_row, y_weight, first, second, x_weight, full,
                          plane, x_length, COPY)  # fmt: skip
            under = u - peak[None, :]
            acc += tl.sum(tl.where(full, tl.exp(under), 0.0), 0)
            if target is not None:
                hot_logit += tl.sum(tl.where(k[:, None] == hot[None, :], u, 0.0), 0)
            if SMOOTHED:
                share = tl.full([BK], 1.0, tl.float32)
                if weight is not None:
                    share = tl.load(weight + k, k < K, 0.0)
                smooth += tl.sum(tl.where(full, -share[:, None] * under, 0.0), 0)
        log_sum = tl.log(acc)
        if peaks is not None:
            tl.store(peaks + at, peak, here)
            tl.store(log_sums + at, log_sum, here)
        if probability is not None:
            tl.store(probability + at, (1.0 / acc).to(probability.dtype.element_ty), here)
        if parts is not None or losses is not None:
            hot_weight = tl.where(hot >= 0, 1.0, 0.0)
            if weight is not None:
                hot_weight = tl.load(weight + hot, hot >= 0, 0.0)
            loss = hot_share * hot_weight * (log_sum + (peak - hot_logit))
            if SMOOTHED:
                total = 1.0 * K
                if weight is not None:
                    total = total_weight(weight, K, BK)
                loss += smooth_share * (total * log_sum + smooth)
            # A label that is no class: never a plausible number.
            loss = tl.where(hot >= 0, loss, tl.where(wrong, float("nan"), 0.0))
            if losses is not None:
                tl.store(losses + at, loss.to(losses.dtype.element_ty), here)
            if parts is not None:
                part = parts + tl.program_id(0).to(tl.int64) * 2
                tl.store(part, tl.sum(loss, 0))
                tl.store(part + 1, tl.sum(hot_weight, 0))


@triton.jit(do_not_specialize=["programs"])
def total(parts, loss, sums, programs, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the loss, in its dtype and in float32 before what it was divided by, [2]."""
    losses = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < programs:
        i = start + tl.arange(0, BLOCK)
        losses += tl.load(parts + i.to(tl.int64) * 2, i < programs, 0.0)
        weights += tl.load(parts + i.to(tl.int64) * 2 + 1, i < programs, 0.0)
        start += BLOCK
    value = tl.sum(losses, 0)
    divisor = tl.sum(weights, 0)
    divisor = tl.where(divisor == 0, 1.0, divisor) if MEAN else tl.full([], 1.0, tl.float32)
    value = value / divisor
    tl.store(loss, value.to(loss.dtype.element_ty))
    tl.store(sums, value)
    tl.store(sums + 1, divisor)


@triton.jit
def upstream_of(upstream, at, here, hot, wrong):
    """What each pixel's loss is multiplied by: 0 where it does not count, NaN where it is wrong."""
    scale = tl.where(here, 1.0, 0.0)
    if upstream is not None:
        scale = tl.load(upstream + at, here, 0.0).to(tl.float32)
    return tl.where(hot >= 0, scale, tl.where(wrong, float("nan"), 0.0))


@triton.jit(do_not_specialize=[*_AXES, "ignore_index"])
def to_rows(
    logits, target, weight, upstream, peaks, log_sums, out,
    ignore_index, y_a, y_b, y_d, y_length, y_step, y_size,
    x_a, x_b, x_d, x_length, x_step, x_size, hot_share, smooth_share,
    K: tl.constexpr, SMOOTHED: tl.constexpr, COPY: tl.constexpr, PROBABILITY: tl.constexpr,
    BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Gradient of the upsampled logits, summed over the output rows of each source row:
    out [B, K, h, W]. With PROBABILITY `target` is the predicted class."""
    blocks = tl.cdiv(x_size, BP)
    column = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    here = column < x_size
    row = (tl.program_id(0) // blocks) % y_length
    image = (tl.program_id(0) // blocks // y_length).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    full = (k < K)[:, None] & here[None, :]
    first, second, x_weight = place(column, x_a, x_b, x_d, x_length, x_step)
    plane = y_length * x_length
    base = logits + image * K * plane + (k.to(tl.int64) * plane)[:, None]
    share = tl.full([BK], 1.0, tl.float32)
    if weight is not None:
        share = tl.load(weight + k, k < K, 0.0)
    over = 1.0 * K
    if SMOOTHED and weight is not None:
        over = total_weight(weight, K, BK)

    acc = tl.zeros([BK, BP], tl.float32)
    for before in range(2):
        # Output rows between source row `upper` and the next: this one, then the one before.
        upper = row - before
        lower = tl.minimum(upper + y_step, y_length - 1)
        top = tl.maximum(upper, 0) * x_length
        bottom = tl.maximum(lower, 0) * x_length
        over_row = tl.load(base + (top + first)[None, :], full, 0.0).to(tl.float32)
        under_row = over_row
        if not COPY:
            right = tl.load(base + (top + second)[None, :], full, 0.0).to(tl.float32)
            under_row = tl.load(base + (bottom + first)[None, :], full, 0.0).to(tl.float32)
            last = tl.load(base + (bottom + second)[None, :], full, 0.0).to(tl.float32)
            over_row = (1.0 - x_weight)[None, :] * over_row + x_weight[None, :] * right
            under_row = (1.0 - x_weight)[None, :] * under_row + x_weight[None, :] * last
        y = begin(upper, y_a, y_b, y_d, y_size)
        end = begin(upper + 1, y_a, y_b, y_d, y_size)
        end = tl.where((upper == row) | (lower == row), end, y)
        while y < end:
            _, _, y_weight = place(y, y_a, y_b, y_d, y_length, y_step)
            u = over_row
            if not COPY:
                u = (1.0 - y_weight) * over_row + y_weight * under_row
            at = (image * y_size + y) * x_size + column
            peak = tl.load(peaks + at, here, 0.0)
            log_sum = tl.load(log_sums + at, here, 0.0)
            if PROBABILITY:
                hot = tl.load(target + at, here, -1).to(tl.int32)
                scale = upstream_of(upstream, at, here, hot, here & (hot < 0))
                of_hot = -scale * tl.exp(-log_sum)
            else:
                hot, wrong = label_of(target, at, here, ignore_index, K)
                scale = upstream_of(upstream, at, here, hot, wrong)
                of_hot = scale * hot_share
                if weight is not None:
                    of_hot *= tl.load(weight + hot, hot >= 0, 0.0)
            of_softmax = of_hot
            if SMOOTHED:
                of_softmax += scale * smooth_share * over
            value = of_softmax[None, :] * tl.exp((u - peak[None, :]) - log_sum[None, :])
            value -= tl.where(k[:, None] == hot[None, :], of_hot[None, :], 0.0)
            if SMOOTHED:
                value -= (scale * smooth_share)[None, :] * share[:, None]
            on_row = tl.where(upper == row, 1.0 - y_weight, 0.0)
            on_row += tl.where(lower == row, y_weight, 0.0)
            acc += on_row * value
            y += 1
    at = ((image * K + k)[:, None] * y_length + row) * x_size + column[None, :]
    tl.store(out + at, acc, full)


@triton.jit(do_not_specialize=[*_AXES, "ignore_index", "pixels"])
def class_sums(
    logits, target, upstream, peaks, log_sums, out,
    ignore_index, pixels, y_a, y_b, y_d, y_length, y_step, y_size,
    x_a, x_b, x_d, x_length, x_step, x_size, hot_share, smooth_share,
    K: tl.constexpr, SMOOTHED: tl.constexpr, COPY: tl.constexpr, BK: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """Of BP pixels, by class: the gradient of a sum of losses with respect to the class weight, and
    the pixels of the class. out [programs, 2, K]."""
    blocks = tl.cdiv(pixels, BP)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    here = pixel < pixels
    at = image * pixels + pixel
    first_row, second_row, y_weight = place(pixel // x_size, y_a, y_b, y_d, y_length, y_step)
    first, second, x_weight = place(pixel % x_size, x_a, x_b, x_d, x_length, x_step)
    plane = y_length * x_length
    hot, wrong = label_of(target, at, here, ignore_index, K)
    scale = upstream_of(upstream, at, here, hot, wrong)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    full = (k < K)[:, None] & here[None, :]
    u = upsampled(logits + image * K * plane, k, first_row, second_row, y_weight, first, second,
                  x_weight, full, plane, x_length, COPY)  # fmt: skip
    peak = tl.load(peaks + at, here, 0.0)
    log_sum = tl.load(log_sums + at, here, 0.0)
    surprise = log_sum[None, :] + (peak[None, :] - u)
    hit = k[:, None] == hot[None, :]
    value = tl.where(hit, hot_share * surprise, 0.0)
    if SMOOTHED:
        value += smooth_share * surprise
    value = tl.where(full, scale[None, :] * value, 0.0)
    slot = out + tl.program_id(0).to(tl.int64) * 2 * K + k
    tl.store(slot, tl.sum(value, 1), k < K)
    tl.store(slot + K, tl.sum(tl.where(hit, 1.0, 0.0), 1), k < K)


@triton.jit(do_not_specialize=["ignore_index", "pixels", "span"])
def count(
    prediction, target, confusion, ignore_index, pixels, span,
    K: tl.constexpr, BINS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Adds the pixels of each cell to confusion [K, K], `span` pixels a program. Integers, whose
    order does not matter; BINS cells are counted within the program first, none where 0."""
    start = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(start + span, pixels)
    if BINS > 0:
        counts = tl.zeros([BINS], tl.int32)
    while start < end:
        at = start + tl.arange(0, BP)
        here = at < end
        hot, _ = label_of(target, at, here, ignore_index, K)
        found = tl.load(prediction + at, here, 0).to(tl.int64)
        here = here & (hot >= 0) & (found >= 0) & (found < K)
        cell = tl.where(here, hot * K + found, 0).to(tl.int32)
        if BINS > 0:
            counts += tl.histogram(cell, BINS, here)
        else:
            tl.atomic_add(confusion + cell, 1, here)
        start += BP
    if BINS > 0:
        cell = tl.arange(0, BINS)
        tl.atomic_add(confusion + cell, counts.to(tl.int64), (cell < K * K) & (counts > 0))
