"""The stem's operator in Triton: the order of convolutions and passes, memory and launches.

The same order as ``csrc/common/residual_halving.h``. Kernels are in ``triton_maps.py``; the
convolutions are the vendor's. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels.hypert import triton_maps as kernels

# The interpreter's time goes by operations, not by sizes.
_ROWS, _CHANNELS = (1024, 256) if INTERPRETED else (32, 64)  # of a tile
_MOST_PARTS = 1024  # programs that add up rows
_LAST = torch.channels_last


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_LAST)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_LAST)


def _tile(x: Tensor) -> dict[str, int]:
    channels = min(_CHANNELS, triton.next_power_of_2(x.shape[1]))
    return {"C": x.shape[1], "BR": _ROWS, "BC": channels}


def _rows(x: Tensor) -> int:
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    if rows >= 2**31:
        raise ValueError(f"x: got {rows} pixels, expected fewer than {2**31}")
    return rows


def _grid(x: Tensor) -> tuple[int, int]:
    tile = _tile(x)
    return triton.cdiv(_rows(x), tile["BR"]), triton.cdiv(tile["C"], tile["BC"])


def _parts(x: Tensor) -> tuple[Tensor, int, int]:
    """Memory for the sums of all programs, the programs, and the rows of each."""
    rows = _rows(x)
    span = triton.cdiv(triton.cdiv(rows, _MOST_PARTS), _ROWS) * _ROWS
    programs = triton.cdiv(rows, span) if rows else 0
    parts = torch.empty(programs, 2, x.shape[1], dtype=torch.float32, device=x.device)
    return parts, programs, span


def _final(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of the sum of parts."""
    channels = min(_CHANNELS if INTERPRETED else 16, triton.next_power_of_2(x.shape[1]))
    return (triton.cdiv(x.shape[1], channels),), {"C": x.shape[1], "BP": 64, "BC": channels}


def _table(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    table = torch.empty(4, x.shape[1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return table.fill_(torch.nan)
    parts, programs, span = _parts(x)
    grid = (programs, _grid(x)[1])
    launch(kernels.add_moments, grid, x, parts, table, _rows(x), span, **_tile(x))
    grid_final, tile = _final(x)
    launch(
        kernels.make_table, grid_final, parts, weight.contiguous(), bias.contiguous(), table,
        _rows(x), programs, eps, **tile,
    )  # fmt: skip
    return table


def _apply(x: Tensor, table: Tensor | None, skip: Tensor | None, out: Tensor) -> Tensor:
    if x.numel():
        launch(
            kernels.apply, _grid(x), x, table, skip, out, _rows(x),
            NORM=table is not None, GELU=skip is not None, **_tile(x),
        )  # fmt: skip
    return out


def _norm_gradients(grad: Tensor, x: Tensor, table: Tensor, gelu: bool, eps: float) -> Tensor:
    both = torch.empty(2, x.shape[1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return both.zero_()
    parts, programs, span = _parts(x)
    grid = (programs, _grid(x)[1])
    launch(
        kernels.add_gradients, grid, grad, x, table, parts, _rows(x), span, GELU=gelu, **_tile(x)
    )
    grid_final, tile = _final(x)
    launch(kernels.make_gradients, grid_final, parts, table, both, programs, eps, **tile)
    return both


def _gradient(
    grad: Tensor, x: Tensor, table: Tensor | None, both: Tensor | None, gelu: bool, eps: float
) -> Tensor:
    out = _empty(grad)
    if x.numel():
        launch(
            kernels.gradient, _grid(x), grad, x, table, both, out, _rows(x), eps,
            NORM=table is not None, GELU=gelu, **_tile(x),
        )  # fmt: skip
    return out


class Given(NamedTuple):
    """The operator's arguments."""

    x: Tensor
    lift: Tensor | None
    lift_bias: Tensor | None
    weight: Tensor
    bias: Tensor
    norm: Tensor | None
    norm_bias: Tensor | None
    half: Tensor
    half_bias: Tensor
    half_norm: Tensor | None
    half_norm_bias: Tensor | None
    eps: float
    keep: bool

    @property
    def folded(self) -> bool:
        """Whether the 1x1 convolution runs inside the 3x3 one, as in C++."""
        lift = self.lift
        return lift is not None and 4 * (lift.shape[1] + 1) <= 3 * lift.shape[0]

    @property
    def channels(self) -> int:
        """Of `images`: the vendor's channels-last convolutions take 16 bytes of them at once."""
        return (self.x.shape[1] + 8) // 8 * 8

    def lift_matrix(self) -> Tensor:
        """[M, channels], the bias as the weight of a channel of ones."""
        assert self.lift is not None
        assert self.lift_bias is not None
        matrix = torch.cat([self.lift.flatten(1), self.lift_bias[:, None]], dim=1)
        return F.pad(matrix, (0, self.channels - matrix.shape[1]))

    def taps(self) -> Tensor:
        """[M * 9, M] of the 3x3 convolution."""
        return self.weight.permute(0, 2, 3, 1).flatten(0, 2)

    def as_weight(self, taps: Tensor) -> Tensor:
        """[M * 9, channels] as the weight of a 3x3 convolution."""
        return taps.view(self.weight.shape[0], 3, 3, -1).permute(0, 3, 1, 2)

    def images(self) -> Tensor:
        """x with a channel of ones, and zeros."""
        batch, bands, height, width = self.x.shape
        images = self.x.new_zeros(batch, height, width, self.channels).permute(0, 3, 1, 2)
        images[:, :bands].copy_(self.x)
        images[:, bands].fill_(1.0)
        return images

    def lifted(self, images: Tensor | None) -> Tensor:
        """[B, M, H, W]: the 1x1 convolution, or x; `images` where folded."""
        if self.lift is None:
            return _last(self.x)
        if images is None:
            return _last(F.conv2d(_last(self.x), self.lift, self.lift_bias))
        return _last(F.conv2d(images, self.lift_matrix()[:, :, None, None]))


def residual_halving(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, both tables and, where they are kept, both convolutions' results."""
    g = Given(*args)
    images = g.images() if g.folded else None
    skip = g.lifted(images)
    if images is None:
        convolved = _last(F.conv2d(skip, g.weight, g.bias, padding=1))
    else:
        folded = g.as_weight(g.taps() @ g.lift_matrix())
        convolved = _last(F.conv2d(images, folded, g.bias, padding=1))
    del images
    table = half_table = None
    if g.norm is not None and g.norm_bias is not None:
        table = _table(convolved, g.norm, g.norm_bias, g.eps)
    # Only a lifted map and what is not kept are ours to write over.
    into = skip if g.lift is not None else _empty(convolved) if g.keep else convolved
    total = _apply(convolved, table, skip, into)
    halved = out = _last(F.conv2d(total, g.half, g.half_bias, stride=2))
    if g.half_norm is not None and g.half_norm_bias is not None:
        half_table = _table(halved, g.half_norm, g.half_norm_bias, g.eps)
        out = _apply(halved, half_table, None, _empty(halved) if g.keep else halved)
    none = torch.empty(4, 0, dtype=torch.float32, device=g.x.device)
    return (
        out,
        none if table is None else table,
        none.clone() if half_table is None else half_table,
        convolved if g.keep else g.x.new_empty(0),
        halved if g.keep and half_table is not None else g.x.new_empty(0),
    )


def _convolution_backward(
    grad: Tensor, given: Tensor, weight: Tensor, stride: int, padding: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad, given, weight, [weight.shape[0]], [stride] * 2, [padding] * 2, [1, 1], False,
        [0, 0], 1, mask,
    )  # fmt: skip
    return found


def residual_halving_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted, in the order of the arguments."""
    *args, saved, mask = values
    g, wanted = Given(*args), list(mask[:11])
    grads: list[Tensor | None] = [None] * 11
    if output_grads[0] is not None:
        _fill(g, _last(output_grads[0]), saved, wanted, grads)
    return [
        torch.empty_like(value).copy_(grad) if grad is not None else torch.zeros_like(value)
        for value, grad, needs in zip(g[:11], grads, wanted, strict=True)
        if needs and value is not None
    ]


def _fill(
    g: Given, grad: Tensor, saved: Sequence[Tensor], wanted: list[bool], grads: list[Tensor | None]
) -> None:
    """Write the gradients wanted into `grads`."""
    table, half_table = (None if t.shape[1] == 0 else t for t in saved[:2])
    convolved, halved = saved[2:]
    inside = any(wanted[:7])
    if half_table is not None:
        both = _norm_gradients(grad, halved, half_table, False, g.eps)
        grads[9], grads[10] = both[0], both[1]
        grad = _gradient(grad, halved, half_table, both, False, g.eps)
    images = g.images() if g.folded and (inside or wanted[7]) else None
    # A batch norm of the batch's statistics takes any bias out again: its gradient is 0.
    half_bias = wanted[8] and half_table is None
    if wanted[7] or half_bias:
        total = convolved  # of the same shape
        if wanted[7]:
            skip = g.lifted(images)
            total = _apply(convolved, table, skip, skip if g.lift is not None else _empty(skip))
            del skip
        mask = [False, wanted[7], half_bias]
        _, grads[7], grads[8] = _convolution_backward(grad, total, g.half, 2, 0, mask)
        del total
    if not inside:
        return
    # By itself: the sum is gone by now.
    found = _convolution_backward(grad, convolved, g.half, 2, 0, [True, False, False])
    total_grad = _last(found[0])
    del grad, found
    norms = None
    if table is not None:
        norms = _norm_gradients(total_grad, convolved, table, True, g.eps)
        grads[5], grads[6] = norms[0], norms[1]
    convolved_grad = _gradient(total_grad, convolved, table, norms, True, g.eps)
    if images is None:
        _fill_plain(g, convolved_grad, total_grad, wanted, grads)
    else:
        _fill_folded(g, images, convolved_grad, total_grad, wanted, grads)
    if table is not None:
        grads[4] = None


def _fill_plain(
    g: Given, grad: Tensor, total_grad: Tensor, wanted: list[bool], grads: list[Tensor | None]
) -> None:
    before = any(wanted[:3])
    if not (before or wanted[3] or wanted[4]):
        return
    given = g.lifted(None) if wanted[3] else grad
    skip_grad, grads[3], grads[4] = _convolution_backward(
        grad, given, g.weight, 1, 1, [before, wanted[3], wanted[4]]
    )
    if not before:
        return
    skip_grad = _last(skip_grad).add_(total_grad)
    if g.lift is None:
        grads[0] = skip_grad
        return
    grads[0], grads[1], grads[2] = _convolution_backward(
        skip_grad, _last(g.x), g.lift, 1, 0, wanted[:3]
    )


def _fill_folded(
    g: Given, images: Tensor, grad: Tensor, total_grad: Tensor, wanted: list[bool],
    grads: list[Tensor | None],
) -> None:  # fmt: skip
    weights, lifts = any(wanted[1:4]), wanted[1] or wanted[2]
    lift, bands = g.lift_matrix(), g.x.shape[1]
    folded = g.as_weight(g.taps() @ lift)
    if not (wanted[0] or weights or wanted[4]):
        return
    image_grad, folded_grad, grads[4] = _convolution_backward(
        grad, images, folded, 1, 1, [wanted[0], weights, wanted[4]]
    )
    if wanted[0] or lifts:
        skip_image_grad, lift_grad, _ = _convolution_backward(
            total_grad, images, lift[:, :, None, None], 1, 0, [wanted[0], lifts, False]
        )
    if wanted[0]:
        grads[0] = image_grad.add_(skip_image_grad)[:, :bands]
    if not weights:
        return
    taps_grad = folded_grad.permute(0, 2, 3, 1).flatten(0, 2)  # [M * 9, channels]
    grads[3] = g.as_weight(taps_grad @ lift.t())
    if lifts:
        lift_grad = lift_grad.flatten(1) + g.taps().t() @ taps_grad
        grads[1], grads[2] = lift_grad[:, :bands, None, None], lift_grad[:, bands]


def compilations() -> Iterator[Compilation]:
    """What both passes compile: in bfloat16 with and without norms, in float32 with them."""
    cases = [("bfloat16", True), ("bfloat16", False), ("float32", True)]
    for dtype, norm in cases:
        like = torch.empty(0, dtype=getattr(torch, dtype), device="meta")
        pairs = [
            [like.new_empty(n), like.new_empty(n)] if norm else [None, None] for n in (64, 128)
        ]
        given = (
            like.new_empty(2, 32, 224, 224), like.new_empty(64, 32, 1, 1), like.new_empty(64),
            like.new_empty(64, 64, 3, 3), like.new_empty(64), *pairs[0],
            like.new_empty(128, 64, 2, 2), like.new_empty(128), *pairs[1], 1e-5, True,
        )  # fmt: skip
        wanted = [value is not None for value in given[:11]]
        with recorded() as launches:
            out, *saved = residual_halving(*given)
            residual_halving_backward([out], *given, saved, [*wanted, False, False])
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape="32 bands" if norm else "folded norms")
