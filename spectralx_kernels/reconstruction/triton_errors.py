"""Triton kernels of the reconstruction losses: errors by cell, the predictions' gradient, the sum.

A program takes a cell of one image: a patch, or some rows. Targets are made where they are compared
and never stored. Cells of weight 0 are not read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from spectralx_kernels.upsample.triton_axis import place

_AXES = [f"{side}_{name}" for side in "yx" for name in ("a", "b", "d", "length", "step", "size")]
_LAYOUT = [
    "cell_columns", "height", "width", "image_stride", "cell_row_stride", "cell_stride", "y_stride",
    "x_stride", "band_stride",
]  # fmt: skip
_SOURCE = ["source_height", "source_width", "full_height", "full_width"]
PATCH, NORMALIZED, RESIZED, DETAIL, AVERAGE = range(5)


@triton.jit
def nearest(i, scale, length):
    """Where output i of a line lies among `length` values, by nearest neighbour, in float32."""
    return tl.minimum((i.to(tl.float32) * scale).to(tl.int32), length - 1)


@triton.jit
def bilinear(plane, width, y, x, here, y_a, y_b, y_d, y_length, y_step, x_a, x_b, x_d, x_length,
             x_step):  # fmt: skip
    """A map resized, at outputs (y, x)."""
    top, bottom, y_weight = place(y, y_a, y_b, y_d, y_length, y_step)
    left, right, x_weight = place(x, x_a, x_b, x_d, x_length, x_step)
    upper = (1.0 - x_weight) * tl.load(plane + top * width + left, here, 0.0).to(tl.float32)
    upper += x_weight * tl.load(plane + top * width + right, here, 0.0).to(tl.float32)
    lower = (1.0 - x_weight) * tl.load(plane + bottom * width + left, here, 0.0).to(tl.float32)
    lower += x_weight * tl.load(plane + bottom * width + right, here, 0.0).to(tl.float32)
    mixed = (1.0 - y_weight) * upper + y_weight * lower
    return tl.where((y_step == 0) & (x_step == 0), upper, mixed)


@triton.jit
def target_of(
    images, base, image, band, y, x, here, mean, scale, height, width,
    source_height, source_width, full_height, full_width, y_nearest, x_nearest,
    y_a, y_b, y_d, y_length, y_step, x_a, x_b, x_d, x_length, x_step,
    C: tl.constexpr, TARGET: tl.constexpr, WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr,
):  # fmt: skip
    """What the prediction at (band, y, x) is compared with."""
    plane = images + (image * C + band) * (source_height.to(tl.int64) * source_width)
    if TARGET == 2:  # RESIZED
        return bilinear(plane, source_width, y, x, here, y_a, y_b, y_d, y_length, y_step,
                        x_a, x_b, x_d, x_length, x_step)  # fmt: skip
    elif TARGET == 3:  # DETAIL
        row = nearest(y, y_nearest, source_height)
        column = nearest(x, x_nearest, source_width)
        sharp = tl.load(plane + row * source_width + column, here, 0.0).to(tl.float32)
        small = base + (image * C + band) * (y_length.to(tl.int64) * x_length)
        return sharp - bilinear(small, x_length, y, x, here, y_a, y_b, y_d, y_length, y_step,
                                x_a, x_b, x_d, x_length, x_step)  # fmt: skip
    elif TARGET == 4:  # AVERAGE of a window of the image repeated to full_height x full_width
        top = y * full_height // height
        bottom = ((y + 1) * full_height + height - 1) // height
        left = x * full_width // width
        right = ((x + 1) * full_width + width - 1) // width
        total = tl.zeros_like(mean + y.to(tl.float32))
        for i in tl.static_range(WINDOW_ROWS):
            row = nearest(top + i, y_nearest, source_height)
            for j in tl.static_range(WINDOW_COLUMNS):
                column = nearest(left + j, x_nearest, source_width)
                inside = here & (top + i < bottom) & (left + j < right)
                total += tl.load(plane + row * source_width + column, inside, 0.0).to(tl.float32)
        return total / ((bottom - top) * (right - left)).to(tl.float32)
    else:
        value = tl.load(plane + y * source_width + x, here, 0.0).to(tl.float32)
        return scale * (value - mean) if TARGET == 1 else value


@triton.jit
def within(e, cell_row, cell_column, height, C: tl.constexpr, ROWS: tl.constexpr,
           COLUMNS: tl.constexpr, LAST: tl.constexpr):  # fmt: skip
    """Band, row and column of a cell's element e, in the order of memory; whether it is there."""
    if LAST:
        band = e % C
        column = e // C % COLUMNS
        row = e // (C * COLUMNS)
    else:
        column = e % COLUMNS
        row = e // COLUMNS % ROWS
        band = e // (COLUMNS * ROWS)
    here = (e < C * ROWS * COLUMNS) & (cell_row * ROWS + row < height)
    return band, cell_row * ROWS + row, cell_column * COLUMNS + column, row, column, here


@triton.jit(do_not_specialize=[*_AXES, *_LAYOUT, *_SOURCE])
def cell_errors(
    prediction, images, base, weight, errors, gradient, upstream, count,
    cell_columns, height, width, image_stride, cell_row_stride, cell_stride, y_stride, x_stride,
    band_stride, source_height, source_width, full_height, full_width, y_nearest, x_nearest,
    y_a, y_b, y_d, y_length, y_step, y_size, x_a, x_b, x_d, x_length, x_step, x_size, factor,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TARGET: tl.constexpr,
    LAST: tl.constexpr, ABSOLUTE: tl.constexpr, WINDOW_ROWS: tl.constexpr,
    WINDOW_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """errors [B, cells], the sum over a cell of (p - t)^2 or |p - t|; or, where `gradient` is
    given, its derivative times weight * factor * upstream / count."""
    cell = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    slot = image * tl.num_programs(0) + cell
    cell_row = cell // cell_columns
    cell_column = cell % cell_columns
    share = 1.0
    if weight is not None:
        share = tl.load(weight + slot)
    full = tl.zeros([BLOCK], tl.float32) + share != 0.0
    LENGTH: tl.constexpr = C * ROWS * COLUMNS
    mean = tl.full([1], 0.0, tl.float32)
    scale = tl.full([1], 1.0, tl.float32)
    if TARGET == 1:  # NORMALIZED: mean and variance of the patch first
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, LENGTH, BLOCK):
            e = start + tl.arange(0, BLOCK)
            band, y, x, _, _, here = within(
                e, cell_row, cell_column, height, C, ROWS, COLUMNS, False
            )
            at = images + ((image * C + band) * source_height + y) * source_width + x
            total += tl.load(at, here & full, 0.0).to(tl.float32)
        mean += tl.sum(total, 0) / LENGTH
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, LENGTH, BLOCK):
            e = start + tl.arange(0, BLOCK)
            band, y, x, _, _, here = within(
                e, cell_row, cell_column, height, C, ROWS, COLUMNS, False
            )
            at = images + ((image * C + band) * source_height + y) * source_width + x
            apart = tl.load(at, here & full, 0.0).to(tl.float32) - mean
            total += tl.where(here & full, apart * apart, 0.0)
        FREEDOM: tl.constexpr = LENGTH - 1 if LENGTH > 1 else 1
        scale = 1.0 / tl.sqrt_rn(tl.sum(total, 0) / FREEDOM + 1e-6 + tl.zeros([1], tl.float32))
    first = (
        image * image_stride + cell_row.to(tl.int64) * cell_row_stride + cell_column * cell_stride
    )
    if gradient is not None:
        share *= factor * tl.load(upstream).to(tl.float32)
        if count is not None:
            masked = tl.load(count)
            share /= tl.where(masked == 0.0, 1.0, masked)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, LENGTH, BLOCK):
        e = start + tl.arange(0, BLOCK)
        band, y, x, row, column, here = within(e, cell_row, cell_column, height, C, ROWS, COLUMNS,
                                               LAST)  # fmt: skip
        at = (
            first
            + row.to(tl.int64) * y_stride
            + column * x_stride
            + band.to(tl.int64) * band_stride
        )
        read = here & full
        wanted = target_of(
            images, base, image, band, y, x, read, mean, scale, height, width,
            source_height, source_width, full_height, full_width, y_nearest, x_nearest,
            y_a, y_b, y_d, y_length, y_step, x_a, x_b, x_d, x_length, x_step,
            C, TARGET, WINDOW_ROWS, WINDOW_COLUMNS,
        )  # fmt: skip
        apart = tl.load(prediction + at, read, 0.0).to(tl.float32) - wanted
        if gradient is not None:
            if ABSOLUTE:
                value = tl.where(apart > 0, share, 0.0) - tl.where(apart < 0, share, 0.0)
            else:
                value = share * 2.0 * apart
            value = tl.where(read, value, 0.0)
            tl.store(gradient + at, value.to(gradient.dtype.element_ty), here)
        else:
            total += tl.where(read, tl.abs(apart) if ABSOLUTE else apart * apart, 0.0)
    if errors is not None:
        tl.store(errors + slot, tl.sum(total, 0))


@triton.jit(do_not_specialize=["cells"])
def weighted_mean(
    first, second, weight, loss, cells, first_factor, second_factor, BLOCK: tl.constexpr
):
    """One program: (first_factor first + second_factor second) * weight, summed over that of the
    weight, or as it is without weight; in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < cells:
        i = start + tl.arange(0, BLOCK)
        here = i < cells
        value = first_factor * tl.load(first + i, here, 0.0)
        if second is not None:
            value += second_factor * tl.load(second + i, here, 0.0)
        if weight is not None:
            share = tl.load(weight + i, here, 0.0)
            count += share
            # What was not read counts as nothing.
            value = tl.where(share != 0.0, share * value, 0.0)
        total += value
        start += BLOCK
    sum_ = tl.sum(total, 0)
    if weight is not None:
        masked = tl.sum(count, 0)
        sum_ = sum_ / tl.where(masked == 0.0, 1.0, masked)
    tl.store(loss, sum_.to(loss.dtype.element_ty))
