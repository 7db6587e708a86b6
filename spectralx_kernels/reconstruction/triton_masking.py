"""Random masking and moves of tokens in Triton.

A token's rank is how many noises are smaller, counted: nothing is sorted. Gradients gather too: a
row looks for the rows it went to, so that nothing is added atomically.
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

_RANKED = 256 if INTERPRETED else 16  # tokens whose ranks a program counts
_COMPARED = 256  # noises it compares them with at a time
_WIDTH = 1024 if INTERPRETED else 128  # channels that a program moves
_FOUND = 64  # rows that a gradient looks among at a time


@triton.jit(do_not_specialize=["tokens", "keep"])
def rank(noise, kept, mask, restore, tokens, keep, BI: tl.constexpr, BJ: tl.constexpr):
    """kept [B, keep], mask [B, L] and restore [B, L] from noise [B, L]."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    here = i < tokens
    own = tl.load(noise + image * tokens + i, here, 0.0).to(tl.float32)[:, None]
    below = tl.zeros([BI], tl.int32)
    start = 0
    while start < tokens:
        j = start + tl.arange(0, BJ)
        other = tl.load(noise + image * tokens + j, j < tokens, 0.0).to(tl.float32)[None, :]
        # NaN last; equal noises, and NaN, in order.
        before = (other < own) | ((own != own) & (other == other))
        same = (other == own) | ((own != own) & (other != other))
        before = before | (same & (j[None, :] < i[:, None]))
        below += tl.sum(tl.where(before & (j < tokens)[None, :], 1, 0), 1)
        start += BJ
    at = image * tokens + i
    tl.store(restore + at, below.to(tl.int64), here)
    tl.store(mask + at, tl.where(below >= keep, 1, 0).to(mask.dtype.element_ty), here)
    tl.store(kept + image * keep + below, i.to(tl.int64), here & (below < keep))


@triton.jit(do_not_specialize=["kept", "count", "width"])
def move(tokens, ids, filler, out, kept, count, width, BD: tl.constexpr):
    """out [B, count, width]: row ids[b, i] of tokens [B, kept, width], or `filler` from kept on."""
    row = tl.program_id(0).to(tl.int64)
    image = row // count
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    here = d < width
    source = tl.load(ids + row) + tl.zeros([BD], tl.int64)
    inside = (source >= 0) & (source < kept)
    value = tl.load(tokens + (image * kept + source) * width + d, here & inside, 0.0)
    if filler is not None:
        other = tl.load(filler + d, here, 0.0).to(value.dtype)
        value = tl.where(inside, value, other)
    tl.store(out + row * width + d, value, here)


@triton.jit(do_not_specialize=["kept", "count", "width"])
def collect(grads, ids, out, rest, kept, count, width, BN: tl.constexpr, BD: tl.constexpr):
    """out [B, kept, width]: the sum of the rows i of grads [B, count, width] whose ids[b, i] is the
    row; rest [B, width]: of those with `kept` or more, by program `kept` of an image."""
    row = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    start = 0
    while start < count:
        i = start + tl.arange(0, BN)
        target = tl.load(ids + image * count + i, i < count, -1)
        mine = tl.zeros([BN], tl.int64) + row
        hit = (target == mine) | ((mine == kept) & (target >= kept))
        at = grads + (image * count + i)[:, None] * width + d[None, :]
        total += tl.sum(tl.load(at, hit[:, None] & (d < width)[None, :], 0.0).to(tl.float32), 0)
        start += BN
    mine = tl.zeros([BD], tl.int32) + row
    tl.store(out + (image * kept + row) * width + d, total.to(out.dtype.element_ty),
             (d < width) & (mine < kept))  # fmt: skip
    if rest is not None:
        tl.store(rest + image * width + d, total, (d < width) & (mine == kept))


def random_masking(noise: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """As ``reference.random_masking``, in one launch."""
    noise = noise.contiguous()
    batch, tokens = noise.shape
    restore = noise.new_empty(batch, tokens, dtype=torch.int64)
    kept = noise.new_empty(batch, keep, dtype=torch.int64)
    mask = noise.new_empty(batch, tokens, dtype=torch.uint8)
    if noise.numel():
        launch(
            rank, (triton.cdiv(tokens, _RANKED), batch), noise, kept, mask, restore, tokens, keep,
            BI=_RANKED, BJ=_COMPARED,
        )  # fmt: skip
    return kept, mask.view(torch.bool), restore


def _move(tokens: Tensor, ids: Tensor, filler: Tensor | None) -> Tensor:
    tokens, ids = tokens.contiguous(), ids.contiguous()
    (batch, kept, width), count = tokens.shape, ids.shape[1]
    out = tokens.new_empty(batch, count, width)
    if out.numel():
        block = min(_WIDTH, triton.next_power_of_2(width))
        launch(
            move, (batch * count, triton.cdiv(width, block)), tokens, ids, filler, out, kept, count,
            width, BD=block,
        )  # fmt: skip
    return out


def _collect(
    grad: Tensor | None, ids: Tensor, tokens: Tensor, *, rest: bool
) -> tuple[Tensor, Tensor | None]:
    batch, kept, width = tokens.shape
    if grad is None or grad.numel() == 0:
        return tokens.new_zeros(tokens.shape), tokens.new_zeros(batch, width) if rest else None
    out = tokens.new_empty(tokens.shape)
    over = tokens.new_empty(batch, width, dtype=torch.float32) if rest else None
    block = min(_WIDTH, triton.next_power_of_2(width))
    programs = kept + rest
    if programs:
        launch(
            collect, (programs, triton.cdiv(width, block), batch), grad.contiguous(),
            ids.contiguous(), out, over, kept, ids.shape[1], width,
            BN=min(_FOUND, triton.next_power_of_2(ids.shape[1])), BD=block,
        )  # fmt: skip
    return out, over


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """As ``reference.gather_tokens``; rows that are not there are 0."""
    return _move(tokens, ids, None)


def gather_tokens_backward(
    output_grads: Sequence[Tensor | None], tokens: Tensor, ids: Tensor, _saved: Any, mask: Any
) -> list[Tensor]:
    """The gradient of the tokens, if wanted."""
    return [_collect(output_grads[0], ids, tokens, rest=False)[0]] if mask[0] else []


def restore_tokens(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """As ``reference.restore_tokens``."""
    return _move(tokens, ids_restore, mask_token.contiguous())


def restore_tokens_backward(
    output_grads: Sequence[Tensor | None], tokens: Tensor, ids_restore: Tensor,
    mask_token: Tensor, _saved: Any, mask: Any,
) -> list[Tensor]:  # fmt: skip
    """The gradients wanted of tokens and mask token."""
    out, over = _collect(output_grads[0], ids_restore, tokens, rest=mask[2])
    grads = [out] if mask[0] else []
    if over is not None:
        # One program an image has added up its own; then the images, in order.
        grads.append(over.sum(0).reshape(mask_token.shape).to(mask_token.dtype))
    return grads


def compilations() -> Iterator[Compilation]:
    """What the operators compile, at the paper's sizes."""
    noise = torch.empty(2, 196, device="meta")
    ids = torch.empty(2, 196, dtype=torch.int64, device="meta")
    tokens = torch.empty(2, 49, 512, dtype=torch.bfloat16, device="meta")
    token = torch.empty(1, 1, 512, device="meta")
    grad = torch.empty(2, 196, 512, dtype=torch.bfloat16, device="meta")
    with recorded() as launches:
        random_masking(noise, 49)
        gather_tokens(tokens, ids)
        restore_tokens(tokens, ids, token)
        restore_tokens_backward([grad], tokens, ids, token, [], [True, False, True])
    for compiled in launches:
        yield compiled._replace(dtype="bfloat16", shape="196 of 512")
