"""Loss, prediction and counts of upsampled logits in Triton: memory and launches.

Kernels are in ``triton_pixels.py`` and ``triton_axis.py``; what is launched and why is in
README.md. Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels.upsample import triton_pixels as kernels
from spectralx_kernels.upsample.reference import REDUCTIONS
from spectralx_kernels.upsample.triton_axis import Axis, spread

# Values of a tile [classes, pixels]. The interpreter's time goes by operations, not by sizes.
_TILE = 2**18 if INTERPRETED else 1024
_MOST_CLASSES = 512 if INTERPRETED else 32  # of a tile
_MOST_PIXELS = 4096 if INTERPRETED else 256
_MOST_BINS = 4096  # cells of a confusion matrix that a program counts by itself
_COUNTED = 1024  # pixels of a tile that is counted
_SPAN = 16 * _COUNTED  # pixels whose counts a program adds up


class Score(NamedTuple):
    """What `Pass.score` was asked for."""

    losses: Tensor | None = None  # [B, H, W]
    loss: Tensor | None = None  # [], and with it:
    sums: Tensor | None = None  # [2]: the loss in float32, and what it was divided by
    peaks: Tensor | None = None  # [B, H, W], largest logit, and with it:
    log_sums: Tensor | None = None  # log of the sum of exponentials under it
    label: Tensor | None = None
    probability: Tensor | None = None


class Pass:
    """Logits, labels and options, as the kernels take them."""

    def __init__(self, logits: Tensor, size: Sequence[int], align_corners: bool) -> None:
        self.dtype = logits.dtype
        self.logits = logits.contiguous()
        self.batch, self.classes, height, width = logits.shape
        self.rows = Axis.of(height, size[0], align_corners)
        self.columns = Axis.of(width, size[1], align_corners)
        self.pixels = size[0] * size[1]
        if max(self.pixels, height * width) >= 2**31:
            raise ValueError(f"size: got {list(size)}, expected fewer than {2**31} pixels")
        self.target: Tensor | None = None
        self.weight: Tensor | None = None
        self.ignore_index, self.smoothing, self.reduction = 0, 0.0, "sum"
        self.tile = min(triton.next_power_of_2(self.classes), _MOST_CLASSES)

    def against(
        self, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, code: int
    ) -> Pass:
        """With labels, and the options of the loss."""
        self.target = target.contiguous()
        self.weight = None if weight is None else weight.float().contiguous()
        self.ignore_index, self.smoothing = ignore_index, smoothing
        self.reduction = REDUCTIONS[code]
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the pixels, [B, H, W]."""
        return self.batch, self.rows.size, self.columns.size

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory on the device of the logits."""
        return torch.empty(shape, dtype=dtype, device=self.logits.device)

    def block(self, pixels: int) -> int:
        """Of the pixels, how many a tile holds."""
        return int(min(_TILE // self.tile, _MOST_PIXELS, triton.next_power_of_2(pixels)))

    def options(self) -> tuple[float, float]:
        """The shares of the label and, of each class, of the smoothing."""
        return 1.0 - self.smoothing, self.smoothing / self.classes

    def meta(self, pixels: int, *, smoothed: bool = True) -> dict[str, Any]:
        """Compile-time arguments that the kernels share."""
        return {
            "K": self.classes,
            "SMOOTHED": smoothed and self.smoothing > 0,
            "COPY": self.rows.step == 0 and self.columns.step == 0,
            "BK": self.tile,
            "BP": self.block(pixels),
        }

    def score(
        self,
        *,
        losses: bool = False,
        sums: bool = False,
        softmax: bool = False,
        label: bool = False,
        probability: bool = False,
    ) -> Score:
        """One launch over the pixels, and one for the sums."""
        found = Score(
            losses=self.new(*self.shape, dtype=self.dtype) if losses else None,
            loss=self.new(dtype=self.dtype) if sums else None,
            sums=self.new(2) if sums else None,
            peaks=self.new(*self.shape) if softmax else None,
            log_sums=self.new(*self.shape) if softmax else None,
            label=self.new(*self.shape, dtype=torch.int64) if label else None,
            probability=self.new(*self.shape, dtype=self.dtype) if probability else None,
        )
        meta = self.meta(self.pixels)
        programs = self.batch * triton.cdiv(self.pixels, meta["BP"])
        parts = self.new(programs, 2) if sums else None
        if programs:
            launch(
                kernels.score, (programs,),
                self.logits, self.target, self.weight, parts, found.losses, found.peaks,
                found.log_sums, found.label, found.probability,
                self.ignore_index, self.pixels, *self.rows, *self.columns, *self.options(), **meta,
            )  # fmt: skip
        if sums:
            launch(
                kernels.total, (1,), parts, found.loss, found.sums, programs,
                MEAN=self.reduction == "mean", BLOCK=1024,
            )  # fmt: skip
        return found

    def gradient(
        self, found: Score, dtype: torch.dtype, upstream: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        """Of the logits, [B, K, h, w]: of the loss over its divisor times `factor`, or of `losses`
        times `upstream`; without labels, of the probability times `upstream`."""
        out = self.new(*self.logits.shape, dtype=dtype)
        if self.batch == 0:
            return out
        meta = self.meta(self.columns.size)
        rows = self.new(self.batch, self.classes, self.rows.length, self.columns.size)
        by_probability = self.target is None
        launch(
            kernels.to_rows,
            (
                self.batch * self.rows.length * triton.cdiv(self.columns.size, meta["BP"]),
                triton.cdiv(self.classes, self.tile),
            ),
            self.logits, found.label if by_probability else self.target, self.weight, upstream,
            found.peaks, found.log_sums, rows,
            self.ignore_index, *self.rows, *self.columns, *self.options(),
            PROBABILITY=by_probability, **meta,
        )  # fmt: skip
        divisor = None if found.sums is None else found.sums[1:]
        lines, width = self.classes * self.rows.length, self.columns.length
        tile_p, tile_m = (1024, 256) if INTERPRETED else (32, 32)
        tile_p = min(tile_p, triton.next_power_of_2(width))
        launch(
            spread, (self.batch * triton.cdiv(width, tile_p) * triton.cdiv(lines, tile_m),),
            rows, divisor, factor, out,
            1, lines, self.columns.size, 0, *self.columns,
            lines * self.columns.size, 0, 1, self.columns.size,
            lines * width, 0, 0, 1, width,
            TAPS=1, BP=tile_p, BM=tile_m,
        )  # fmt: skip
        return out

    def weight_gradient(self, found: Score, upstream: Tensor | None) -> Tensor:
        """Of the class weights, [K], of the loss or of `losses` times `upstream`."""
        meta = self.meta(self.pixels)
        programs = self.batch * triton.cdiv(self.pixels, meta["BP"])
        parts = self.new(programs, 2, self.classes)
        if programs:
            launch(
                kernels.class_sums, (programs, triton.cdiv(self.classes, self.tile)),
                self.logits, self.target, upstream, found.peaks, found.log_sums, parts,
                self.ignore_index, self.pixels, *self.rows, *self.columns, *self.options(), **meta,
            )  # fmt: skip
        grad, counts = parts.sum(0).unbind(0)
        if found.sums is None or self.weight is None or self.reduction != "mean":
            return grad if found.sums is None else grad / found.sums[1]
        # Where nothing weighs anything the divisor is 1, whatever the weights.
        weighs = (counts * self.weight).sum() != 0
        through_divisor = torch.where(weighs, found.sums[0] * counts, torch.zeros_like(counts))
        return (grad - through_divisor) / found.sums[1]


def _count(confusion: Tensor, prediction: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    counted = confusion.clone(memory_format=torch.contiguous_format)
    pixels, classes = target.numel(), confusion.shape[0]
    if pixels and classes:
        bins = triton.next_power_of_2(classes**2)
        launch(
            kernels.count, (triton.cdiv(pixels, _SPAN),),
            prediction.contiguous(), target.contiguous(), counted, ignore_index, pixels, _SPAN,
            K=classes, BINS=bins if bins <= _MOST_BINS else 0,
            BP=_SPAN if INTERPRETED else _COUNTED,
        )  # fmt: skip
    return counted


def confusion_matrix_update(*values: Any) -> Tensor:
    """As ``reference.confusion_matrix_update``: what is no class is left out."""
    return _count(*values)


def _loss(given: Pass, with_gradient: bool, label: bool) -> tuple[Tensor, Tensor, Score]:
    if given.reduction == "none":
        found = given.score(losses=True, label=label)
        assert found.losses is not None
        return found.losses, given.new(0), found
    found = given.score(sums=True, softmax=with_gradient, label=label)
    assert found.loss is not None
    gradient = given.new(0)
    if with_gradient:
        gradient = given.gradient(found, torch.float32, None, None)
    return found.loss, gradient, found


def _loss_backward(
    given: Pass, loss_grad: Tensor | None, saved: Sequence[Tensor], logits: bool,
    weight: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    wanted = [given.logits] * logits + ([] if weight is None else [weight])
    if loss_grad is None or given.batch == 0:
        return [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in wanted]
    summed = given.reduction != "none"
    upstream = None if summed else loss_grad.contiguous()
    keeps = summed and len(saved) == 1 and saved[0].shape == given.logits.shape
    grads = []
    found = Score()
    if weight is not None or not keeps:
        found = given.score(sums=summed, softmax=True)
    if logits and keeps:
        grads.append((saved[0] * loss_grad.float()).to(given.dtype))
    elif logits:
        factor = loss_grad.contiguous() if summed else None
        grads.append(given.gradient(found, given.dtype, upstream, factor))
    if weight is not None:
        grad = given.weight_gradient(found, upstream)
        grads.append((grad * loss_grad.float() if summed else grad).to(weight.dtype))
    return grads


def upsample_cross_entropy(*values: Any) -> tuple[Tensor, Tensor]:
    """The loss and, of a loss that is one number, its gradient in float32 if wanted, else [0]."""
    logits, target, weight, size, *options, align_corners, with_gradient = values
    given = Pass(logits, size, align_corners).against(target, weight, *options)
    return _loss(given, with_gradient, label=False)[:2]


def upsample_cross_entropy_backward(
    output_grads: Sequence[Tensor | None], *values: Any
) -> list[Tensor]:
    """The gradients wanted of logits and class weights."""
    logits, target, weight, size, *options, align_corners, _, saved, mask = values
    given = Pass(logits, size, align_corners).against(target, weight, *options)
    return _loss_backward(given, output_grads[0], saved, mask[0], weight if mask[2] else None)


def upsample_cross_entropy_argmax(*values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, class, counts or [0, 0], and the gradient as of `upsample_cross_entropy`."""
    logits, target, weight, confusion, size, *options, align_corners, with_gradient = values
    given = Pass(logits, size, align_corners).against(target, weight, *options)
    loss, gradient, found = _loss(given, with_gradient, label=True)
    assert found.label is not None
    if confusion is None:
        return loss, found.label, found.label.new_empty(0, 0), gradient
    return loss, found.label, _count(confusion, found.label, target, given.ignore_index), gradient


def upsample_cross_entropy_argmax_backward(
    output_grads: Sequence[Tensor | None], *values: Any
) -> list[Tensor]:
    """The gradients wanted of logits and class weights; counts have none."""
    logits, target, weight, _, size, *options, align_corners, _, saved, mask = values
    given = Pass(logits, size, align_corners).against(target, weight, *options)
    return _loss_backward(given, output_grads[0], saved, mask[0], weight if mask[2] else None)


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """The class of the largest logit, or of the first NaN."""
    label = Pass(logits, size, align_corners).score(label=True).label
    assert label is not None
    return label


def upsample_argmax_probability(
    logits: Tensor, size: Sequence[int], align_corners: bool
) -> tuple[Tensor, Tensor]:
    """The probability of that class, and the class."""
    found = Pass(logits, size, align_corners).score(label=True, probability=True)
    assert found.probability is not None
    assert found.label is not None
    return found.probability, found.label


def upsample_argmax_probability_backward(
    output_grads: Sequence[Tensor | None], *values: Any
) -> list[Tensor]:
    """The gradient of the logits, if wanted."""
    logits, size, align_corners, _, mask = values
    if not mask[0]:
        return []
    upstream = output_grads[0]
    if upstream is None:
        return [torch.zeros_like(logits, memory_format=torch.contiguous_format)]
    given = Pass(logits, size, align_corners)
    found = given.score(label=True, softmax=True)
    return [given.gradient(found, given.dtype, upstream.contiguous(), None)]


# Classes and reduction: the paper's head, one of many classes.
_SHAPES = {"25, mean": (25, True, "mean"), "300, none, smoothed": (300, False, "none")}


def compilations() -> Iterator[Compilation]:
    """What the operators compile: in bfloat16 at both shapes, the others at the first."""
    cases = [("bfloat16", shape) for shape in _SHAPES]
    for dtype, shape in [*cases, ("float32", "25, mean"), ("float16", "25, mean")]:
        classes, plain, reduction = _SHAPES[shape]
        logits = torch.empty(2, classes, 56, 56, dtype=getattr(torch, dtype), device="meta")
        target = torch.empty(2, 224, 224, dtype=torch.int64, device="meta")
        weight = None if plain else torch.empty(classes, device="meta")
        confusion = torch.empty(classes, classes, dtype=torch.int64, device="meta")
        options = ([224, 224], 255, 0.0 if plain else 0.1, REDUCTIONS.index(reduction), False, True)
        with recorded() as launches:
            given = (logits, target, weight, confusion, *options)
            loss, *_, gradient = upsample_cross_entropy_argmax(*given)
            if not plain:
                upsample_cross_entropy_argmax_backward(
                    [loss, None, None], *given, [gradient], [True, False, True] + [False] * 7
                )
                found = upsample_argmax_probability(logits, [224, 224], False)
                upsample_argmax_probability_backward(
                    [found[0], None], logits, [224, 224], False, [], [True, False, False]
                )
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape=shape)
