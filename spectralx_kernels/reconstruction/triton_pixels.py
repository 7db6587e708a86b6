"""ScaleMAE's way from a map to pixels in Triton: a vendor's products and what lies between them.

The first product's result is left as it comes, [pixels of x, k k E], and read so by the grouped
convolution (`triton_grouped.py`). Backward makes the products again, but for the first where its
result is kept. Some images are worked on at a time, as many as `_AT_ONCE` allows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels._triton_gelu import below, gelu_slope
from spectralx_kernels.reconstruction.triton_grouped import Grouped, taps_of, weight_of

_AT_ONCE = 1 << 27  # values of the widest map


@triton.jit(do_not_specialize=["count"])
def gelu(x, out, slope, count, BLOCK: tl.constexpr):
    """out = GELU(x), slope its derivative; out may be x."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < count, 0.0).to(tl.float32)
    tl.store(out + i, (value * below(value)).to(out.dtype.element_ty), i < count)
    if slope is not None:
        tl.store(slope + i, gelu_slope(value).to(slope.dtype.element_ty), i < count)


class _Head(NamedTuple):
    """Weights as products take them, [in, out]; the taps [9, E]."""

    expand: Tensor
    expand_bias: Tensor
    taps: Tensor
    taps_bias: Tensor
    mix: Tensor
    mix_bias: Tensor
    project: Tensor
    project_bias: Tensor
    up: int
    down: int

    @staticmethod
    def of(weights: Sequence[Tensor]) -> _Head:
        expand, expand_bias, grouped, grouped_bias, mix, mix_bias, project, project_bias = weights
        up, down = expand.shape[2], project.shape[2]
        return _Head(
            expand.permute(0, 2, 3, 1).flatten(1),
            expand_bias.repeat(up * up),
            taps_of(grouped),
            grouped_bias.contiguous(),
            mix.flatten(1).t(),
            mix_bias,
            project.permute(0, 2, 3, 1).flatten(1),
            project_bias.repeat(down * down),
            up,
            down,
        )

    @property
    def channels(self) -> int:
        """Of the large map."""
        return self.taps.shape[1]

    def expanded(self, x: Tensor) -> Tensor:
        """The first product's result, [pixels of x, k k E], of x [pixels, D]."""
        return torch.addmm(self.expand_bias, x, self.expand)


class _Part:
    """Some images of a call: x [images, h, w, D], and `wide`, [images, h, w, k k E], if kept."""

    def __init__(self, head: _Head, x: Tensor, wide: Tensor | None = None) -> None:
        self.head, self.x = head, x.flatten(0, 2)
        self.images, self.height, self.width, _ = x.shape
        if wide is None:
            wide = head.expanded(self.x).view(*x.shape[:3], -1)
        self.conv = Grouped(wide, head.taps, head.taps_bias, head.up)
        self.pixels = self.conv.pixels

    def mixed(self, half: Tensor, *, slope: bool) -> tuple[Tensor, Tensor | None]:
        """[pixels, M] behind the third GELU, and the derivative there."""
        out = torch.addmm(self.head.mix_bias, half, self.head.mix)
        slopes = torch.empty_like(out) if slope else None
        block = 1024
        launch(gelu, (triton.cdiv(out.numel(), block),), out, out, slopes, out.numel(), BLOCK=block)
        return out, slopes

    def pixels_of(self, values: Tensor) -> Tensor:
        """[pixels, n n C] as [images, rows, columns, C] of pixels."""
        down, lines = self.head.down, self.height * self.head.up
        parts = values.view(self.images, lines, -1, down, down, values.shape[1] // down**2)
        moved: Tensor = parts.permute(0, 1, 3, 2, 4, 5)
        return moved.reshape(self.images, lines * down, -1, parts.shape[5])

    def values_of(self, grad: Tensor) -> Tensor:
        """The way back: [pixels, n n C] of [images, rows, columns, C]."""
        down = self.head.down
        parts = grad.unflatten(2, (-1, down)).unflatten(1, (-1, down))
        values: Tensor = parts.permute(0, 1, 3, 2, 4, 5).reshape(self.pixels, -1)
        return values


def _parts(head: _Head, x: Tensor, wide: Tensor | None = None) -> Iterator[tuple[slice, _Part]]:
    rows = x.permute(0, 2, 3, 1).contiguous()
    values = rows[:1].numel() // max(rows.shape[-1], 1) * head.up**2 * head.channels
    most = max(1, _AT_ONCE // max(values, 1))
    for first in range(0, len(rows), most):
        part = slice(first, min(first + most, len(rows)))
        yield part, _Part(head, rows[part], None if wide is None else wide[part])


def pixel_head(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """As ``heads_reference.pixel_head_saving``."""
    *weights, keep = others
    head = _Head.of(weights)
    wide = None
    if keep:
        rows = x.permute(0, 2, 3, 1)
        wide = head.expanded(rows.flatten(0, 2)).view(*rows.shape[:3], head.up**2 * head.channels)
    scale = head.up * head.down
    bands = weights[6].shape[1]
    out = x.new_empty(len(x), x.shape[2] * scale, x.shape[3] * scale, bands)
    for images, part in _parts(head, x, wide):
        half, _ = part.conv.forward(slope=False)
        mixed, _ = part.mixed(half, slope=False)
        out[images] = part.pixels_of(torch.addmm(head.project_bias, mixed, head.project))
    return out.permute(0, 3, 1, 2), x.new_empty(0) if wide is None else wide


def _gradients(head: _Head, part: _Part, grad: Tensor, wanted: Sequence[bool]) -> dict[int, Tensor]:
    """By place among the arguments; of weights in float32 and as `_Head` has them."""

    def of_rows(rows: Tensor) -> Tensor:
        return rows.sum(0, dtype=torch.float32)

    found: dict[int, Tensor] = {}
    to_mix, to_group, to_expand = (any(wanted[:stage]) for stage in (7, 5, 3))
    half, half_slope = part.conv.forward(slope=to_group)
    mixed, mixed_slope = part.mixed(half, slope=to_mix)
    values = part.values_of(grad)
    if wanted[7]:
        found[7] = (mixed.t() @ values).float()
    if wanted[8]:
        found[8] = of_rows(values)
    del mixed
    if mixed_slope is None:
        return found
    mixed_grad = (values @ head.project.t()).mul_(mixed_slope)
    del mixed_slope
    if wanted[5]:
        found[5] = (half.t() @ mixed_grad).float()
    if wanted[6]:
        found[6] = of_rows(mixed_grad)
    if half_slope is None:
        return found
    half_grad = (mixed_grad @ head.mix.t()).mul_(half_slope)
    if wanted[3]:
        found[3] = part.conv.tap_gradients(half_grad)
    if wanted[4]:
        found[4] = of_rows(half_grad)
    if not to_expand:
        return found
    wide_grad = part.conv.spread(half_grad).flatten(0, 2)
    if wanted[1]:
        found[1] = (part.x.t() @ wide_grad).float()
    if wanted[2]:
        found[2] = of_rows(wide_grad)
    if wanted[0]:
        found[0] = wide_grad @ head.expand.t()
    return found


def pixel_head_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted, in the order of the arguments."""
    *inputs, keep, saved, wanted = values
    x, *weights = inputs
    grad = output_grads[0]
    if grad is None or len(x) == 0:
        return [
            torch.zeros_like(value)
            for value, wants in zip(inputs, wanted[:-1], strict=True)
            if wants
        ]
    head, rows = _Head.of(weights), grad.permute(0, 2, 3, 1)
    totals: dict[int, Tensor] = {}
    of_x = []
    for images, part in _parts(head, x, saved[0] if keep else None):
        found = _gradients(head, part, rows[images], wanted)
        if 0 in found:
            of_x.append(found.pop(0))
        totals = {key: totals[key] + value if totals else value for key, value in found.items()}
    up, down = head.up, head.down
    layouts = {
        1: lambda g: g.unflatten(1, (up, up, -1)).permute(0, 3, 1, 2),
        2: lambda g: g.unflatten(0, (up * up, -1)).sum(0),
        3: weight_of,
        5: lambda g: g.t()[:, :, None, None],
        7: lambda g: g.unflatten(1, (down, down, -1)).permute(0, 3, 1, 2),
        8: lambda g: g.unflatten(0, (down * down, -1)).sum(0),
    }
    results = []
    if of_x:
        whole = torch.cat(of_x).view(len(x), x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)
        results.append(torch.empty_like(x).copy_(whole))
    for key in sorted(totals):
        laid_out = layouts.get(key, lambda g: g)(totals[key])
        results.append(torch.empty_like(inputs[key]).copy_(laid_out))
    return results


def compilations() -> Iterator[Compilation]:
    """What the operator compiles: ScaleMAE's higher head."""
    for dtype in ("bfloat16", "float32", "float16"):
        shapes = (
            (1, 512, 56, 56), (512, 256, 4, 4), (256,), (128, 2, 3, 3), (128,), (256, 128, 1, 1),
            (256,), (256, 13, 2, 2), (13,),
        )  # fmt: skip
        tensors = [torch.empty(s, dtype=getattr(torch, dtype), device="meta") for s in shapes]
        grad = torch.empty(1, 13, 448, 448, dtype=getattr(torch, dtype), device="meta")
        with recorded() as launches:
            pixel_head(*tensors, False)
            pixel_head_backward([grad], *tensors, False, [], [True] * 9 + [False])
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape="512 channels at 56 x 56")
