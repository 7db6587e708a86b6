"""Norms over the channels of a map in Triton, alone and before a vendor's convolution.

Maps are channels last, [rows, C] to the kernels. A tile is some rows with all of their channels.
Sums over rows are formed by fixed runs of rows and joined in order: no atomics, the same bits each
time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels._triton_gelu import below, gelu_slope
from spectralx_kernels.upsample.triton_norm import join_sums

# Values of a tile, rows of one at most; the least rows and the most number of parts of sums; parts
# that are joined at a time. The interpreter's time goes by operations, whatever their size.
_TILE, _ROWS = (1 << 18, 1024) if INTERPRETED else (2048, 32)
_LEAST, _MOST = 128, 1024
_JOINED = 32
# Values of the normed maps that a convolution takes at a time.
_AT_ONCE = 1 << 27

_COUNTS = ["rows", "span"]


@triton.jit
def activated(x, KIND: tl.constexpr):
    """The activation called KIND of x."""
    if KIND == "gelu":
        x = x * below(x)
    if KIND == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    if KIND == "leaky_relu":
        x = tl.where(x > 0.0, x, 0.01 * x)
    return x


@triton.jit
def times_slope(grad, x, KIND: tl.constexpr):
    """grad times the activation's derivative at x."""
    if KIND == "gelu":
        grad = grad * gelu_slope(x)
    if KIND == "relu":
        grad = tl.where(x <= 0.0, 0.0, grad)
    if KIND == "leaky_relu":
        grad = tl.where(x > 0.0, grad, 0.01 * grad)
    return grad


@triton.jit
def whitened(x, full, eps, C: tl.constexpr):
    """Rows less their mean, over their standard deviation; and one over that."""
    mean = tl.sum(tl.where(full, x, 0.0), 1) / C
    off = tl.where(full, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / C + eps)
    return off * rstd[:, None], rstd


@triton.jit(do_not_specialize=_COUNTS)
def norm(
    x, addend, weight, bias, out, rows, eps, scale, C: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out = AFTER(norm(BEFORE(x))) + scale * addend; no norm without a weight."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    full = (r < rows)[:, None] & (c < C)[None, :]
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    value = activated(tl.load(x + at, full, 0.0).to(tl.float32), BEFORE)
    if weight is not None:
        value, _ = whitened(value, full, eps, C)
        value *= tl.load(weight + c, c < C, 0.0).to(tl.float32)[None, :]
        value += tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
    value = activated(value, AFTER)
    if addend is not None:
        value += scale * tl.load(addend + at, full, 0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), full)


@triton.jit(do_not_specialize=_COUNTS)
def norm_gradient(
    grad, x, weight, bias, out, parts, rows, span, eps, C: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and parts [programs, 2, C] of those of weight and bias over `span` rows."""
    program, c = tl.program_id(0), tl.arange(0, BC)
    of_weight, of_bias = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    row = program * span
    end = tl.minimum(row + span, rows)
    while row < end:
        r = row + tl.arange(0, BR)
        full = (r < end)[:, None] & (c < C)[None, :]
        at = r.to(tl.int64)[:, None] * C + c[None, :]
        value = tl.load(x + at, full, 0.0).to(tl.float32)
        dz = tl.load(grad + at, full, 0.0).to(tl.float32)
        if weight is not None:
            by = tl.load(weight + c, c < C, 0.0).to(tl.float32)[None, :]
            off = tl.load(bias + c, c < C, 0.0).to(tl.float32)[None, :]
            white, rstd = whitened(activated(value, BEFORE), full, eps, C)
            dz = tl.where(full, times_slope(dz, white * by + off, AFTER), 0.0)
            if parts is not None:
                of_weight += tl.sum(dz * white, 0)
                of_bias += tl.sum(dz, 0)
            dz = dz * by
            dz -= (tl.sum(dz, 1) / C)[:, None] + white * (tl.sum(dz * white, 1) / C)[:, None]
            dz *= rstd[:, None]
        else:
            dz = times_slope(dz, activated(value, BEFORE), AFTER)
        if out is not None:
            dz = times_slope(dz, value, BEFORE)
            tl.store(out + at, dz.to(out.dtype.element_ty), full)
        row += BR
    if parts is not None:
        to = parts + program.to(tl.int64) * 2 * C + c
        tl.store(to, of_weight, c < C)
        tl.store(to + C, of_bias, c < C)


def _rows(x: Tensor) -> Tensor:
    """A map as its rows lie, [B, H, W, C]; copied where channels are not side by side."""
    return x.permute(0, 2, 3, 1).contiguous()


def _map(rows: Tensor) -> Tensor:
    return rows.permute(0, 3, 1, 2)


def _tile(rows: Tensor) -> dict[str, Any]:
    channels = rows.shape[-1]
    columns = triton.next_power_of_2(channels)
    high = max(1, min(_ROWS, _TILE // columns))
    return {"C": channels, "BR": high, "BC": columns, "num_warps": 4 if columns <= 1024 else 8}


class _Norm:
    """after(norm(before(x))) of rows."""

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, eps: float, before: str, after: str
    ) -> None:
        self.weight, self.bias = (
            None if value is None else value.contiguous() for value in (weight, bias)
        )
        self.eps = eps
        self.kinds = {"BEFORE": before, "AFTER": after}

    def apply(self, x: Tensor, addend: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Of [B, H, W, C], plus scale * addend."""
        out, tile = torch.empty_like(x), _tile(x)
        count = x.numel() // x.shape[-1]
        if count:
            launch(
                norm, (triton.cdiv(count, tile["BR"]),),
                x, addend, self.weight, self.bias, out, count, self.eps, scale, **self.kinds,
                **tile,
            )  # fmt: skip
        return out

    def gradient(
        self, grad: Tensor, x: Tensor, *, of_x: bool, of_norm: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x, and [2, C] of weight and bias in float32."""
        channels, tile = x.shape[-1], _tile(x)
        count = x.numel() // channels
        span = max(_LEAST if of_norm else tile["BR"], triton.cdiv(count, _MOST) if of_norm else 1)
        programs = triton.cdiv(count, span)
        out = torch.empty_like(x) if of_x else None
        shape = (programs, 2 * channels)
        parts = x.new_empty(shape, dtype=torch.float32) if of_norm else None
        if count:
            launch(
                norm_gradient, (programs,),
                grad, x, self.weight, self.bias, out, parts, count, span, self.eps, **self.kinds,
                **tile,
            )  # fmt: skip
        if parts is None:
            return out, None
        totals = parts.new_zeros(2, channels)
        if count:
            block = min(16, triton.next_power_of_2(2 * channels))
            launch(
                join_sums, (triton.cdiv(2 * channels, block),),
                parts, totals, programs, 2 * channels, BN=_JOINED, BC=block,
            )  # fmt: skip
        return out, totals


def channel_norm(
    x: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor, eps: float, before: str,
    after: str, scale: float,
) -> Tensor:  # fmt: skip
    """As ``heads_reference.channel_norm``."""
    more = None if addend is None else _rows(addend)
    return _map(_Norm(weight, bias, eps, before, after).apply(_rows(x), more, scale))


def _like(grad: Tensor, value: Tensor) -> Tensor:
    """`grad` with the strides of ``torch.empty_like(value)``."""
    to = torch.empty_like(value, device="meta")
    return grad if grad.stride() == to.stride() else torch.empty_like(value).copy_(grad)


def _of_norm(totals: Tensor | None, values: Sequence[Tensor | None], mask: Any) -> list[Tensor]:
    """The gradients wanted of weight and bias."""
    found = []
    for place, value in enumerate(values):
        if mask[place]:
            assert totals is not None
            assert value is not None
            found.append(totals[place].to(value.dtype, copy=True))
    return found


def channel_norm_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted of x, addend, weight and bias."""
    x, addend, weight, bias, eps, before, after, scale, _saved, mask = values
    grad = output_grads[0]
    tensors = (x, addend, weight, bias)
    if grad is None:
        return [torch.zeros_like(tensors[place]) for place in range(4) if mask[place]]
    rows = _rows(grad)
    of_x, totals = _Norm(weight, bias, eps, before, after).gradient(
        rows, _rows(x), of_x=mask[0], of_norm=mask[2] or mask[3]
    )
    found = [] if of_x is None else [_like(_map(of_x), x)]
    if mask[1]:
        found.append(_like(_map(rows * scale), addend))
    return found + _of_norm(totals, (weight, bias), mask[2:4])


def _chunks(x: Tensor) -> Iterator[slice]:
    """Images that are worked on at a time."""
    most = max(1, _AT_ONCE // max(x[:1].numel(), 1))
    for first in range(0, x.shape[0], most):
        yield slice(first, min(first + most, x.shape[0]))


def channel_norm_conv2d(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, before: str,
    after: str, weight: Tensor, bias: Tensor | None, transposed: bool, stride: list[int],
    padding: list[int],
) -> Tensor:  # fmt: skip
    """As ``heads_reference.channel_norm_conv2d``."""
    norm_, rows = _Norm(norm_weight, norm_bias, eps, before, after), _rows(x)
    made = [
        torch.convolution(
            _map(norm_.apply(rows[part])), weight, bias, stride, padding, [1, 1], transposed,
            [0, 0], 1,
        )
        for part in (_chunks(rows) if len(rows) else [slice(0, 0)])
    ]  # fmt: skip
    out = made[0] if len(made) == 1 else torch.cat(made)
    return out.contiguous(memory_format=torch.channels_last)


def channel_norm_conv2d_backward(
    output_grads: Sequence[Tensor | None], *values: Any
) -> list[Tensor]:
    """The gradients wanted of x, the norm's and the convolution's weights and biases."""
    *inputs, _saved, mask = values
    x, norm_weight, norm_bias, eps, before, after, weight, _, transposed, stride, padding = inputs
    grad = output_grads[0]
    if grad is None or len(x) == 0:
        return [torch.zeros_like(inputs[place]) for place in (0, 1, 2, 6, 7) if mask[place]]
    norm_, rows = _Norm(norm_weight, norm_bias, eps, before, after), _rows(x)
    of_norm = mask[1] or mask[2]
    inside = mask[0] or of_norm
    of_x, sums = [], []
    convolution: list[list[Tensor]] = [[], []]
    for part in _chunks(rows):
        given = rows[part]
        # Where the weight is frozen the values do not matter, only their shape.
        normed = norm_.apply(given) if mask[6] else given
        through, *others = torch.ops.aten.convolution_backward(
            grad[part], _map(normed), weight, [weight.shape[1 if transposed else 0]], stride,
            padding, [1, 1], transposed, [0, 0], 1, [inside, mask[6], mask[7]],
        )  # fmt: skip
        del normed
        for known, other in zip(convolution, others, strict=True):
            known += [] if other is None else [other.float()]
        if inside:
            one, two = norm_.gradient(_rows(through), given, of_x=mask[0], of_norm=of_norm)
            of_x += [] if one is None else [one]
            sums += [] if two is None else [two]
    found = []
    if mask[0]:
        whole = of_x[0] if len(of_x) == 1 else torch.cat(of_x)
        found.append(_like(_map(whole), x))
    found += _of_norm(sum(sums[1:], sums[0]) if sums else None, (norm_weight, norm_bias), mask[1:3])
    for place, parts in zip((6, 7), convolution, strict=True):
        if mask[place]:
            total = sum(parts[1:], parts[0]).to(inputs[place].dtype)
            found.append(_like(total, inputs[place]))
    return found


def compilations() -> Iterator[Compilation]:
    """What the operators compile: SatMAE++'s narrow maps and ScaleMAE's wide ones."""
    for name, channels, before, after in (
        ("52 channels", 52, "none", "leaky_relu"),
        ("52 channels, GELU before", 52, "gelu", "none"),
        ("512 channels", 512, "none", "gelu"),
    ):
        for dtype in ("bfloat16", "float32", "float16"):
            x = torch.empty(2, channels, 56, 56, dtype=getattr(torch, dtype), device="meta")
            vector = torch.empty(channels, device="meta")
            given = (x, x, vector, vector, 1e-6, before, after, 0.5)
            with recorded() as launches:
                channel_norm(*given)
                wanted = [True, False, True, True]
                channel_norm_backward([x], *given, [], wanted)
                channel_norm_backward([x], *given, [], [True] + [False] * 3)
                _Norm(None, None, 0.0, "none", "relu").apply(_rows(x))
                _Norm(None, None, 0.0, "none", "relu").gradient(
                    _rows(x), _rows(x), of_x=True, of_norm=False
                )
            for compiled in launches:
                yield compiled._replace(dtype=dtype, shape=name)
