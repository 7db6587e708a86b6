"""Arguments of every operator, drawn: float64, positional, as the operator takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectralx_kernels.upsample.reference import REDUCTIONS
from tests.harden.draws import Draw
from tests.kernels.aomoa import test_aomoa
from tests.kernels.aomoa.by_name import redrawn
from tests.kernels.hypert.test_stem import stem_args

EPS = 1e-5


def gating(draw: Draw) -> Sequence[Any]:
    attributes, experts = draw.size(high=3), draw.size()
    shape = (attributes, 0 if draw.batch() == 0 else draw.size(), experts)
    noisy = draw.flag()
    drawn = [draw.normal(*shape) for _ in range(3)]
    return drawn[0], *(drawn[1:] if noisy else (None, None)), draw.choice(range(1, experts + 1))


def aomoa(draw: Draw) -> Sequence[Any]:
    attributes, experts = draw.size(high=3), draw.size(high=5)
    args = test_aomoa.arguments(
        0 if draw.batch() == 0 else draw.size(),
        attributes * draw.norm_width(),
        attributes * draw.size(high=7),
        attributes=attributes,
        rank=draw.norm_width(),
        hidden=draw.size(high=5),
        experts=experts,
        top_k=draw.choice(range(1, experts + 1)),
        noisy=draw.flag(),
        bias=draw.flag(),
    )
    return redrawn(args, draw.random.randrange(2**31))


def window_attention(draw: Draw) -> Sequence[Any]:
    heads, width = draw.size(high=3), draw.size(high=5)
    sides = [draw.size(high=7), draw.size(high=7)]
    window = [draw.size(high=7), draw.size(high=7)]
    divides = all(side % own == 0 for side, own in zip(sides, window, strict=True))
    channels = 3 * heads * width
    padding = None if divides else draw.normal(channels)
    return draw.normal(draw.batch(), *sides, channels), padding, heads, window


def attribute_match(draw: Draw) -> Sequence[Any]:
    width, inner = draw.norm_width(), draw.size(high=5)
    return (
        draw.normal(draw.batch(), draw.size(), width),
        draw.normal(draw.size(0), inner),
        draw.normal(width, scale=0.1, offset=1),
        draw.normal(width, scale=0.1),
        draw.normal(2 * inner, width),
        EPS,
    )


def _rows(draw: Draw) -> tuple[int, ...]:
    rows: list[tuple[int, ...]] = [
        (draw.size(),), (draw.batch(), draw.size()), (2, draw.batch(), 3),
    ]  # fmt: skip
    found: tuple[int, ...] = draw.choice(rows)
    return found


def norm_linear(draw: Draw) -> Sequence[Any]:
    width, out = draw.norm_width(), draw.size()
    return (
        draw.normal(*_rows(draw), width),
        draw.normal(width, scale=0.1, offset=1),
        draw.normal(width, scale=0.1),
        draw.normal(out, width),
        draw.maybe(out),
        EPS,
    )


def linear_add(draw: Draw) -> Sequence[Any]:
    rows, width, out = _rows(draw), draw.size(), draw.size()
    return (
        draw.normal(*rows, width),
        draw.normal(out, width),
        draw.maybe(out),
        draw.normal(*rows, out),
    )


def linear(draw: Draw) -> Sequence[Any]:
    width, out = draw.size(), draw.size()
    return draw.normal(*_rows(draw), width), draw.normal(out, width), draw.maybe(out)


def patch_conv2d(draw: Draw) -> Sequence[Any]:
    channels, out = draw.size(), draw.size()
    kernel = draw.size(high=4), draw.size(high=4)
    height, width = (side * draw.size(high=3) + draw.choice([0, side - 1]) for side in kernel)
    return (
        draw.normal(draw.batch(), channels, height, width),
        draw.normal(out, channels, *kernel),
        draw.maybe(out),
    )


def feed_forward(draw: Draw) -> Sequence[Any]:
    width, hidden, residual = draw.norm_width(), draw.size(), draw.flag()
    out = width if residual else draw.size()
    return (
        draw.normal(*_rows(draw), width),
        draw.normal(width, scale=0.1, offset=1),
        draw.normal(width, scale=0.1),
        draw.normal(hidden, width),
        draw.maybe(hidden),
        draw.normal(out, hidden),
        draw.maybe(out),
        residual,
        EPS,
    )


def residual_halving(draw: Draw) -> Sequence[Any]:
    args = stem_args(
        None if draw.flag() else draw.size(high=5),
        middle=draw.size(high=7),
        outs=draw.size(high=5),
        norm=draw.flag(),
        half_norm=draw.flag(),
        size=(2 * draw.size(2, 4), 2 * draw.size(2, 4)),
        batch=draw.random.randint(1, 3),
        keep=True,
    )
    return redrawn(args, draw.random.randrange(2**31))


def random_masking(draw: Draw) -> Sequence[Any]:
    tokens = draw.size(0)
    return draw.normal(draw.batch(), tokens), draw.random.randint(0, tokens)


def gather_tokens(draw: Draw) -> Sequence[Any]:
    batch, tokens = draw.batch(), draw.size()
    ids = draw.integers(tokens, batch, draw.size(0), dtype=torch.int64)
    return draw.normal(batch, tokens, draw.size()), ids


def restore_tokens(draw: Draw) -> Sequence[Any]:
    batch, tokens, width = draw.batch(), draw.size(), draw.size()
    ids = torch.rand(batch, tokens, generator=draw.generator).argsort(1)
    mask_token = draw.normal(*([width] if draw.flag() else [1, 1, width]))
    return draw.normal(batch, draw.random.randint(0, tokens), width), ids, mask_token


def _mask(draw: Draw, *shape: int) -> Tensor:
    """Weights of patches: mostly 0 and 1, and of any dtype."""
    mask = draw.integers(2, *shape, dtype=torch.float64)
    if mask.numel():
        mask.view(-1)[0] = 1
    kind = draw.choice(["float", "weights", "bool", "int"])
    if kind == "weights":
        mask = mask * draw.normal(*shape).abs()
    return mask.bool() if kind == "bool" else mask.int() if kind == "int" else mask


def masked_patch_loss(draw: Draw) -> Sequence[Any]:
    batch, bands, patch = draw.batch(), draw.size(high=5), draw.size(high=4)
    grid = draw.size(high=4), draw.size(high=4)
    patches = grid[0] * grid[1]
    return (
        draw.normal(batch, patches, patch * patch * bands),
        draw.normal(batch, bands, grid[0] * patch, grid[1] * patch),
        _mask(draw, batch, patches),
        patch,
        # One value has no variance.
        draw.flag() and patch * patch * bands > 1,
    )


ACTIVATIONS = ("none", "gelu", "relu", "leaky_relu")


def channel_norm(draw: Draw) -> Sequence[Any]:
    channels = draw.norm_width()
    shape = draw.batch(), channels, draw.size(high=5), draw.size(high=5)
    return (
        draw.normal(*shape),
        draw.maybe(*shape),
        draw.normal(channels, scale=0.1, offset=1),
        draw.normal(channels),
        EPS,
        draw.choice(ACTIVATIONS),
        draw.choice(ACTIVATIONS),
        draw.choice([1.0, 0.5]),
    )


def channel_norm_conv2d(draw: Draw) -> Sequence[Any]:
    channels, outs, transposed = draw.norm_width(), draw.size(high=5), draw.flag()
    kernel = draw.size(high=3)
    pair = draw.flag()
    weight = (channels, outs, kernel, kernel) if transposed else (outs, channels, kernel, kernel)
    stride = draw.size(high=kernel) if transposed else draw.choice([1, 2])
    padding = 0 if transposed else kernel // 2
    # Lines from 32 pixels on are another path of the C++ kernels.
    width = 32 + draw.size(high=6) if draw.choice([False, False, True]) else draw.size(kernel, 6)
    sides = draw.size(low=kernel, high=6), width
    return (
        draw.normal(draw.batch(), channels, *sides),
        draw.normal(channels, scale=0.1, offset=1) if pair else None,
        draw.normal(channels) if pair else None,
        EPS,
        draw.choice(ACTIVATIONS),
        draw.choice(ACTIVATIONS),
        draw.normal(*weight),
        draw.maybe(outs),
        transposed,
        [stride, stride],
        [padding, padding],
    )


def gelu_grouped_conv2d(draw: Draw) -> Sequence[Any]:
    half = draw.size(high=4)
    return (
        draw.normal(draw.batch(), 2 * half, draw.size(high=5), draw.size(high=5)),
        draw.normal(half, 2, 3, 3),
        draw.normal(half),
    )


def pixel_head(draw: Draw) -> Sequence[Any]:
    ins, half, mixed, bands = (draw.size(high=4) for _ in range(4))
    up, down = draw.size(high=3), draw.size(high=3)
    return (
        draw.normal(draw.batch(), ins, draw.size(high=4), draw.size(high=4)),
        draw.normal(ins, 2 * half, up, up),
        draw.normal(2 * half),
        draw.normal(half, 2, 3, 3),
        draw.normal(half),
        draw.normal(mixed, half, 1, 1),
        draw.normal(mixed),
        draw.normal(mixed, bands, down, down),
        draw.normal(bands),
        draw.flag(),
    )


def upsampled_l1_loss(draw: Draw) -> Sequence[Any]:
    batch, bands = draw.batch(), draw.size(high=5)
    sides = draw.size(), draw.size()
    images = draw.normal(batch, bands, *(sides if draw.flag() else (draw.size(), draw.size())))
    return draw.normal(batch, bands, *sides), images


def band_reconstruction_loss(draw: Draw) -> Sequence[Any]:
    batch, bands = draw.batch(), draw.size(high=3)
    grid = [draw.size(high=3), draw.size(high=3)]
    high, low = draw.size(high=4), draw.size(high=4)
    return (
        draw.normal(batch, bands, grid[0] * high, grid[1] * high),
        draw.normal(batch, bands, grid[0] * low, grid[1] * low),
        draw.normal(batch, bands, draw.size(), draw.size()),
        _mask(draw, batch, grid[0] * grid[1]),
        grid,
        [draw.size(high=4), draw.size(high=4)],
    )


def match_argmax(draw: Draw) -> Sequence[Any]:
    batch, width = draw.batch(), draw.size()
    queries = draw.normal(batch, draw.size(), width)
    return queries, draw.normal(batch, draw.size(0), width), max(width, 1) ** -0.5


def gather_norm(draw: Draw) -> Sequence[Any]:
    batch, tokens, width = draw.batch(), draw.size(), draw.norm_width()
    return (
        draw.normal(batch, tokens, width),
        draw.integers(tokens, batch, draw.size(0)),
        draw.normal(width, scale=0.1, offset=1),
        draw.normal(width, scale=0.1),
        EPS,
    )


def gather_norm_mix(draw: Draw) -> Sequence[Any]:
    *first, eps = gather_norm(draw)
    return *first, draw.normal(draw.size(), first[1].shape[1]), eps


def add_weighted_halves(draw: Draw) -> Sequence[Any]:
    batch, tokens = draw.batch(), draw.size(0)
    return (
        draw.normal(batch, tokens, 2 * draw.size()),
        draw.normal(batch, tokens),
        draw.normal(batch, tokens),
        draw.normal(),
    )


def confusion_matrix_update(draw: Draw) -> Sequence[Any]:
    classes, shape = draw.size(), (draw.batch(), draw.size(0))
    return (
        draw.integers(9, classes, classes, dtype=torch.int64),
        draw.integers(classes, *shape),
        draw.integers(classes, *shape),
        draw.choice([-100, 0, 255]),
    )


def _map(draw: Draw, batch: int | None = None) -> Tensor:
    batch = draw.batch() if batch is None else batch
    return draw.normal(batch, draw.size(high=7), draw.size(high=7), draw.size(high=7))


def moments(draw: Draw) -> Sequence[Any]:
    return (_map(draw),)


def batch_norm_relu(draw: Draw) -> Sequence[Any]:
    x, batch = _map(draw, draw.random.randint(1, 3)), draw.flag()
    if batch and x.shape[0] * x.shape[2] * x.shape[3] < (8 if draw.conditioned else 2):
        x = draw.normal(3, x.shape[1], 3, x.shape[3])
    channels = x.shape[1]
    given = torch.stack([draw.normal(channels), draw.normal(channels).square() + 0.5])
    weight, bias = (draw.normal(channels), draw.normal(channels)) if draw.flag() else (None, None)
    return x, given, weight, bias, EPS, draw.flag(), batch


def upsample_conv2d_moments(draw: Draw) -> Sequence[Any]:
    x, out = _map(draw), draw.size(high=7)
    kernel = [draw.choice([1, 3, 5]), draw.choice([1, 3])]
    padding = [draw.choice([side // 2, side // 2, 0, 1]) for side in kernel]
    size = list(x.shape[2:]) if draw.flag() else [draw.size(), draw.size()]
    size = [
        max(length, side - 2 * pad) for length, side, pad in zip(size, kernel, padding, strict=True)
    ]
    sides = [
        length + 2 * pad - side + 1 for length, side, pad in zip(size, kernel, padding, strict=True)
    ]
    return (
        x,
        draw.normal(out, x.shape[1], *kernel),
        draw.maybe(out),
        draw.maybe(x.shape[0], out, *sides),
        size,
        padding,
        draw.flag(),
        draw.flag(),
    )


def upsample_conv2d(draw: Draw) -> Sequence[Any]:
    return *upsample_conv2d_moments(draw), draw.flag()


def upsample_cross_entropy(draw: Draw) -> Sequence[Any]:
    logits = _map(draw)
    batch, classes = logits.shape[:2]
    size = [draw.size(), draw.size()]
    weight = None if draw.flag() else draw.normal(classes).abs() + 0.1
    return (
        logits,
        draw.integers(classes, batch, *size),
        weight,
        size,
        draw.choice([-100, 0, 255]),
        draw.choice([0.0, 0.1, 1.0]),
        draw.choice(range(len(REDUCTIONS))),
        draw.flag(),
        True,
    )


def upsample_cross_entropy_argmax(draw: Draw) -> Sequence[Any]:
    logits, target, weight, *rest = upsample_cross_entropy(draw)
    classes = logits.shape[1]
    confusion = draw.integers(9, classes, classes, dtype=torch.int64) if draw.flag() else None
    return logits, target, weight, confusion, *rest


def upsample_argmax(draw: Draw) -> Sequence[Any]:
    return _map(draw), [draw.size(), draw.size()], draw.flag()
