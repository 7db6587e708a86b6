"""The losses of masked reconstruction in Triton: memory and launches.

Kernels are in ``triton_errors.py``; masking and moves of tokens in ``triton_masking.py``. Gradients
of images and masks, which no training asks for, are those of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._layouts import is_channels_last
from spectralx_kernels._operator import Operator
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels.reconstruction import ops
from spectralx_kernels.reconstruction import triton_errors as kernels
from spectralx_kernels.upsample.triton_axis import Axis

_BLOCK = 2**14 if INTERPRETED else 1024  # elements of a cell that a program holds
_ROWS = 2  # of a cell, where there is no mask


class Target(NamedTuple):
    """What a prediction is compared with: the kernels' arguments after the layout."""

    kind: int
    images: Tensor
    size: tuple[int, int]
    base: Tensor | None = None
    full: tuple[int, int] = (1, 1)

    def arguments(self) -> list[Any]:
        """Sizes of the source, positions of nearest neighbours, axes of the interpolation."""
        source = (self.images.shape[2], self.images.shape[3])
        repeated = self.full if self.kind == kernels.AVERAGE else self.size
        scales = [have / want for have, want in zip(source, repeated, strict=True)]
        small = source if self.base is None else (self.base.shape[2], self.base.shape[3])
        axes = [Axis(1, 0, 1, 1, 0, 1)] * 2
        if self.kind in (kernels.RESIZED, kernels.DETAIL):
            axes = [Axis.of(s, n, False) for s, n in zip(small, self.size, strict=True)]
        return [*source, *self.full, *scales, *axes[0], *axes[1]]

    def windows(self) -> list[int]:
        """Most rows and columns of a window that is averaged."""
        if self.kind != kernels.AVERAGE:
            return [1, 1]
        return [
            max(-(-(i + 1) * full // size) - i * full // size for i in range(size))
            for full, size in zip(self.full, self.size, strict=True)
        ]


class Compared(NamedTuple):
    """A prediction, cut in cells of rows x columns, and its target."""

    prediction: Tensor
    target: Target
    cell: tuple[int, int]
    patches: bool = False  # the prediction is [B, L, rows * columns * C]
    absolute: bool = False
    weight: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        (height, width), (rows, columns) = self.target.size, self.cell
        return triton.cdiv(height, rows), width // columns

    def run(
        self, *, gradient: Tensor | None = None, upstream: Tensor | None = None,
        count: Tensor | None = None, factor: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """One launch: errors by cell [B, cells] in float32, or the gradient where it is given."""
        batch, bands = self.target.images.shape[:2]
        (rows, columns), grid = self.cell, self.grid
        p = self.prediction
        if self.patches:
            strides = (columns * bands, bands, 1)
            places = (p.stride(0), grid[1] * p.stride(1), p.stride(1))
        else:
            strides = (p.stride(2), p.stride(3), p.stride(1))
            places = (p.stride(0), rows * p.stride(2), columns * p.stride(3))
        errors = None
        if gradient is None:
            errors = p.new_empty(batch, grid[0] * grid[1], dtype=torch.float32)
        if batch:
            launch(
                kernels.cell_errors, (grid[0] * grid[1], batch),
                p, self.target.images, self.target.base, self.weight, errors, gradient, upstream,
                count, grid[1], *self.target.size, *places, *strides, *self.target.arguments(),
                factor,
                C=bands, ROWS=rows, COLUMNS=columns, TARGET=self.target.kind,
                LAST=strides[2] == 1 and bands > 1, ABSOLUTE=self.absolute,
                WINDOW_ROWS=self.target.windows()[0], WINDOW_COLUMNS=self.target.windows()[1],
                BLOCK=min(_BLOCK, triton.next_power_of_2(bands * rows * columns)),
            )  # fmt: skip
        return p if errors is None else errors

    def gradient(
        self, like: Tensor, upstream: Tensor, count: Tensor | None, factor: float
    ) -> Tensor:
        """Of the prediction, laid out as `like`."""
        out = torch.empty_like(self.prediction)
        self.run(gradient=out, upstream=upstream, count=count, factor=factor)
        return out if out.stride() == like.stride() else torch.empty_like(like).copy_(out)


def _mean(
    found: Sequence[Compared], factors: Sequence[float], weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    errors = [each.run() for each in found]
    loss = torch.empty((), dtype=dtype, device=errors[0].device)
    launch(
        kernels.weighted_mean, (1,),
        errors[0], errors[1] if len(errors) > 1 else None, weight, loss, errors[0].numel(),
        factors[0], factors[-1], BLOCK=1024,
    )  # fmt: skip
    return loss


def _map(map_: Tensor) -> Tensor:
    """Planar or channels last."""
    return map_ if is_channels_last(map_) else map_.contiguous()


def _backward(
    operator: Operator, found: Sequence[Compared], factors: Sequence[float], weight: Tensor | None,
    output_grads: Sequence[Tensor | None], values: Sequence[Any],
) -> list[Tensor]:  # fmt: skip
    *inputs, _, mask = values
    predictions = len(found)
    upstream = output_grads[0]
    if any(mask[predictions:]):
        grads: Sequence[Tensor] = operator._backward_kernel(output_grads, *values)
        return list(grads)
    wanted = [each for each, needs in zip(inputs, mask, strict=True) if needs]
    if upstream is None:
        return [torch.zeros_like(each) for each in wanted]
    count = None if weight is None else weight.sum()
    return [
        each.gradient(like, upstream, count, factor)
        for each, like, factor, needs in zip(found, inputs, factors, mask, strict=False)
        if needs
    ]


def _patches(
    prediction: Tensor, images: Tensor, mask: Tensor, patch: int, normalize: bool
) -> tuple[list[Compared], list[float], Tensor]:
    kind = kernels.NORMALIZED if normalize else kernels.PATCH
    target = Target(kind, images.contiguous(), (images.shape[2], images.shape[3]))
    weight = mask.float().contiguous()
    compared = Compared(
        prediction.contiguous(), target, (patch, patch), patches=True, weight=weight
    )
    return [compared], [1.0 / (patch * patch * images.shape[1])], weight


def masked_patch_loss(*values: Any) -> Tensor:
    """As ``reference.masked_patch_loss``, patches of weight 0 unread."""
    return _mean(*_patches(*values), values[0].dtype)


def masked_patch_loss_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted of prediction, images and mask."""
    given = _patches(*values[:-2])
    return _backward(ops.MASKED_PATCH_LOSS, *given, output_grads, values)


def _resized(prediction: Tensor, images: Tensor) -> tuple[list[Compared], list[float], None]:
    size = (prediction.shape[2], prediction.shape[3])
    target = Target(kernels.RESIZED, images.contiguous(), size)
    compared = Compared(_map(prediction), target, (min(_ROWS, size[0]), size[1]), absolute=True)
    return [compared], [1.0 / max(prediction.numel(), 1)], None


def upsampled_l1_loss(prediction: Tensor, images: Tensor) -> Tensor:
    """As ``reference.upsampled_l1_loss``."""
    return _mean(*_resized(prediction, images), prediction.dtype)


def upsampled_l1_loss_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted of prediction and images."""
    return _backward(ops.UPSAMPLED_L1_LOSS, *_resized(*values[:2]), output_grads, values)


def _bands(
    high: Tensor, low: Tensor, images: Tensor, mask: Tensor, grid: Sequence[int],
    base_size: Sequence[int],
) -> tuple[list[Compared], list[float], Tensor]:  # fmt: skip
    full, images = (high.shape[2], high.shape[3]), images.contiguous()
    source = (images.shape[2], images.shape[3])

    def averaged_from(size: Sequence[int]) -> tuple[int, int]:
        # An average of pixels repeated evenly is that of the pixels, where windows are whole ones.
        repeats = all(f % s == 0 and s % n == 0 for f, s, n in zip(full, source, size, strict=True))
        return source if repeats else full

    base = images.float()  # a cell of `base` is some hundred pixels: small, and made by torch
    if averaged_from(base_size) == full:
        base = F.interpolate(base, size=full, mode="nearest")
    base = F.interpolate(base, size=list(base_size), mode="area").contiguous()
    weight = mask.float().contiguous()
    low_size = (low.shape[2], low.shape[3])
    targets = (
        Target(kernels.DETAIL, images, full, base),
        Target(kernels.AVERAGE, images, low_size, full=averaged_from(low_size)),
    )
    found = [
        Compared(
            _map(prediction), target,
            (target.size[0] // grid[0], target.size[1] // grid[1]), weight=weight,
        )
        for prediction, target in zip((high, low), targets, strict=True)
    ]  # fmt: skip
    return found, [1.0 / (each.cell[0] * each.cell[1]) for each in found], weight


def band_reconstruction_loss(*values: Any) -> Tensor:
    """As ``reference.band_reconstruction_loss``, patches of weight 0 unread."""
    return _mean(*_bands(*values), values[0].dtype)


def band_reconstruction_loss_backward(
    output_grads: Sequence[Tensor | None], *values: Any
) -> list[Tensor]:
    """The gradients wanted of both predictions, images and mask."""
    given = _bands(*values[:-2])
    return _backward(ops.BAND_RECONSTRUCTION_LOSS, *given, output_grads, values)


def compilations() -> Iterator[Compilation]:
    """What the operators compile, at the paper's sizes and 13 bands."""
    for dtype, shape in (("bfloat16", "13"), ("float32", "13, channels last")):
        kind, last = getattr(torch, dtype), shape != "13"
        layout = torch.channels_last if last else torch.contiguous_format

        def maps(
            side: int, kind: torch.dtype = kind, layout: torch.memory_format = layout
        ) -> Tensor:
            made = torch.empty(2, 13, side, side, dtype=kind, device="meta")
            return made.contiguous(memory_format=layout)

        images = torch.empty(2, 13, 224, 224, device="meta")
        mask, one = torch.empty(2, 196, device="meta"), torch.empty((), device="meta")
        patches = torch.empty(2, 196, 13 * 256, dtype=kind, device="meta")
        with recorded() as launches:
            values: tuple[Any, ...] = (patches, images, mask, 16, last)
            masked_patch_loss(*values)
            masked_patch_loss_backward([one], *values, [], [True] + [False] * 4)
            upsampled_l1_loss(maps(448), images)
            upsampled_l1_loss_backward([one], maps(448), images, [], [True, False])
            values = (maps(448), maps(224), images, mask, [14, 14], [14, 14])
            band_reconstruction_loss(*values)
            band_reconstruction_loss_backward(
                [one], *values, [], [True, True, False, False, False, False]
            )
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape=shape)
