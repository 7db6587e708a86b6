"""The Are-adapter's operators in Triton: memory and launches.

Kernels are in ``triton_match.py`` and ``triton_rows.py``; what is launched and why is in README.md.
Nothing here waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels.refine import triton_match as matching
from spectralx_kernels.refine import triton_rows as kernels

# The interpreter's time goes by operations, not by sizes: there tiles are large.
_QUERIES, _KEYS = (64, 256) if INTERPRETED else (16, 64)  # of a tile that sums over keys
_COMPARED = 256 if INTERPRETED else 64  # queries that are compared at once
_FEW = 256  # programs below which tiles are kept small
_SPLITS = 8  # of the keys, where that gives more programs
_DEPTH = 256 if INTERPRETED else 64  # of a product's step
_ROWS = 64 if INTERPRETED else 4
_WIDTH = 1024 if INTERPRETED else 512


def _block(size: int, most: int, least: int = 1) -> int:
    return int(max(least, min(most, triton.next_power_of_2(max(size, 1)))))


def match_argmax(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """As ``reference.match_argmax``."""
    queries, keys = queries.contiguous(), keys.contiguous()
    batch, rows, width = queries.shape
    count = keys.shape[1]
    match = torch.empty(batch, count, dtype=torch.int64, device=keys.device)
    if not match.numel():
        return match
    if not width:  # all scores are equal
        return match.zero_()
    depth = _block(width, _DEPTH, 16)
    steps = triton.cdiv(count, _KEYS)
    span = triton.cdiv(steps, min(_SPLITS, steps)) * _KEYS
    splits = triton.cdiv(count, span)
    peaks = torch.empty(2, batch, splits, rows, dtype=torch.float32, device=keys.device)
    launch(
        matching.sum_keys, (batch * triton.cdiv(rows, _QUERIES), splits),
        queries, keys, peaks[0], peaks[1], rows, count, span, scale,
        D=width, SPLITS=splits, BM=_QUERIES, BN=_KEYS, BK=depth,
    )  # fmt: skip
    tile = 32 if batch * triton.cdiv(count, 32) >= _FEW else 16
    tile = _KEYS if INTERPRETED else tile
    launch(
        matching.choose, (batch * triton.cdiv(count, tile),),
        queries, keys, peaks[0], peaks[1], match, rows, count, scale,
        D=width, SPLITS=splits, BM=_block(rows, _COMPARED, 16), BN=tile, BK=depth,
    )  # fmt: skip
    return match


def _rows_of(tokens: Tensor) -> Tensor:
    return tokens if tokens.stride(2) == 1 or tokens.shape[2] == 1 else tokens.contiguous()


def _tile(width: int) -> dict[str, int]:
    return {"H": width, "BR": _ROWS, "BH": _block(width, _WIDTH)}


def _norm(
    tokens: Tensor, match: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, norm_eps: float
) -> Tensor:
    """Normed rows at match [B, K, H] or, without it, of every token [B, N, H]."""
    tokens = _rows_of(tokens)
    batch, count, width = tokens.shape
    keys = count if match is None else match.shape[1]
    out = tokens.new_empty(batch, keys, width)
    if out.numel():
        launch(
            kernels.norm_rows, (triton.cdiv(batch * keys, _ROWS),),
            tokens, match, norm_weight.contiguous(), norm_bias.contiguous(), out,
            batch * keys, keys, tokens.stride(0), tokens.stride(1), norm_eps, **_tile(width),
        )  # fmt: skip
    return out


def _norm_gradients(
    grad: Tensor | None, tokens: Tensor, match: Tensor, norm_weight: Tensor, norm_eps: float,
    wants_tokens: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Of tokens, norm weight and norm bias, from the gradient [B, K, H] of the gathered rows."""
    rows = _rows_of(tokens)
    batch, count, width = tokens.shape
    like = norm_weight.dtype
    if grad is None or not tokens.numel():
        zeros = torch.zeros(2, width, dtype=like, device=tokens.device)
        nothing = torch.zeros_like(tokens, memory_format=torch.contiguous_format)
        return nothing if wants_tokens else None, zeros[0].clone(), zeros[1].clone()
    keys = match.shape[1]
    summed = torch.empty(batch, count, width, dtype=torch.float32, device=tokens.device)
    columns = _block(width, 1024 if INTERPRETED else 128)
    launch(
        kernels.sum_by_token, (batch * count, triton.cdiv(width, columns)),
        grad.contiguous(), match, summed, count, keys,
        H=width, BK=_block(keys, 1024 if INTERPRETED else 32), BH=columns,
    )  # fmt: skip
    programs = triton.cdiv(batch * count, _ROWS)
    parts = torch.empty(programs, 2, width, dtype=torch.float32, device=tokens.device)
    of_tokens = tokens.new_empty(tokens.shape) if wants_tokens else None
    launch(
        kernels.norm_rows_backward, (programs,),
        rows, summed, norm_weight.contiguous(), of_tokens, parts, batch * count, count,
        rows.stride(0), rows.stride(1), norm_eps, **_tile(width),
    )  # fmt: skip
    sums = parts.sum(0)
    return of_tokens, sums[0].to(like, copy=True), sums[1].to(like, copy=True)


def _wanted(grads: Sequence[Tensor | None], mask: Sequence[bool]) -> list[Tensor]:
    return [grad for grad, wants in zip(grads, mask, strict=True) if wants and grad is not None]


def gather_norm(
    tokens: Tensor, match: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_eps: float
) -> Tensor:
    """As ``reference.gather_norm``."""
    return _norm(tokens, match.contiguous(), norm_weight, norm_bias, norm_eps)


def gather_norm_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted of tokens, norm weight and norm bias."""
    tokens, match, norm_weight, _, norm_eps, _, mask = values
    grads = _norm_gradients(
        output_grads[0], tokens, match.contiguous(), norm_weight, norm_eps, mask[0]
    )
    return _wanted(grads, [mask[0], mask[2], mask[3]])


def gather_norm_mix(
    tokens: Tensor, match: Tensor, norm_weight: Tensor, norm_bias: Tensor, mixing: Tensor,
    norm_eps: float,
) -> Tensor:  # fmt: skip
    """As ``reference.gather_norm_mix``."""
    normed = _norm(tokens, None, norm_weight, norm_bias, norm_eps)
    batch, count, width = tokens.shape
    mixed, keys = mixing.shape
    out = tokens.new_empty(batch, mixed, width)
    if out.numel():
        tile = {"BT": 64 if INTERPRETED else 16, "BH": _block(width, _DEPTH, 16)}
        launch(
            kernels.mix, (batch * triton.cdiv(mixed, tile["BT"]), triton.cdiv(width, tile["BH"])),
            normed, match.contiguous(), mixing.contiguous(), out, count, mixed, keys,
            H=width, BK=_block(keys, _DEPTH, 16), **tile,
        )  # fmt: skip
    return out


def gather_norm_mix_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted of tokens, norm weight, norm bias and mixing."""
    tokens, match, norm_weight, norm_bias, mixing, norm_eps, _, mask = values
    match, mixing, grad = match.contiguous(), mixing.contiguous(), output_grads[0]
    grads: list[Tensor | None] = [None] * 4
    if mask[0] or mask[2] or mask[3]:
        gathered = None if grad is None else torch.matmul(mixing.t(), grad)  # [B, K, H]
        grads[:3] = _norm_gradients(gathered, tokens, match, norm_weight, norm_eps, mask[0])
    if mask[4]:
        batch, count, width = tokens.shape
        mixed, keys = mixing.shape
        if grad is None or not tokens.numel() or not mixing.numel():
            grads[3] = torch.zeros_like(mixing)
        else:
            grads[3] = torch.empty_like(mixing)
            tile = {"BT": 64, "BK": 64} if INTERPRETED else {"BT": 16, "BK": 32}
            launch(
                kernels.mix_gradient,
                (triton.cdiv(mixed, tile["BT"]), triton.cdiv(keys, tile["BK"])),
                _norm(tokens, None, norm_weight, norm_bias, norm_eps), match, grad.contiguous(),
                grads[3], batch, count, mixed, keys,
                H=width, BH=_block(width, _DEPTH, 16), **tile,
            )  # fmt: skip
    return _wanted(grads, [mask[0], mask[2], mask[3], mask[4]])


def add_weighted_halves(
    tokens: Tensor, spatial_weight: Tensor, spectral_weight: Tensor, scale: Tensor
) -> Tensor:
    """As ``reference.add_weighted_halves``."""
    tokens = tokens.contiguous()
    out = torch.empty_like(tokens)
    batch, count, width = tokens.shape
    if out.numel():
        tile = _tile(width // 2)
        launch(
            kernels.weigh,
            (triton.cdiv(2 * batch * count, _ROWS), triton.cdiv(width // 2, tile["BH"])),
            tokens, spatial_weight.contiguous(), spectral_weight.contiguous(), scale, out,
            2 * batch * count, **tile,
        )  # fmt: skip
    return out


def add_weighted_halves_backward(
    output_grads: Sequence[Tensor | None], *values: Any
) -> list[Tensor]:
    """The gradients wanted of tokens, both weights and scale."""
    tokens, spatial, spectral, scale, _, mask = values
    grad = output_grads[0]
    if grad is None or not tokens.numel():
        return _wanted(
            [
                torch.zeros_like(value, memory_format=torch.contiguous_format)
                for value in (tokens, spatial, spectral, scale)
            ],
            mask,
        )
    batch, count, width = tokens.shape
    halves = 2 * batch * count
    of_tokens = tokens.new_empty(tokens.shape) if mask[0] else None
    of_weights = [tokens.new_empty(batch, count) for _ in range(2)]
    parts = torch.empty(halves, dtype=torch.float32, device=tokens.device)
    launch(
        kernels.weigh_backward, (triton.cdiv(halves, _ROWS),),
        tokens.contiguous(), spatial.contiguous(), spectral.contiguous(), scale, grad.contiguous(),
        of_tokens, *of_weights, parts, halves, **_tile(width // 2),
    )  # fmt: skip
    of_scale = parts.sum().to(scale.dtype) if mask[3] else None
    return _wanted([of_tokens, *of_weights, of_scale], mask)


def compilations() -> Iterator[Compilation]:
    """What the operators compile at the paper's sizes."""
    for dtype in ("bfloat16", "float32", "float16"):

        def made(*shape: int, dtype: str = dtype) -> Tensor:
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        tokens, index = made(8, 196, 1024), torch.empty(8, 512, dtype=torch.int64, device="meta")
        first, norm = tokens[..., :512], (made(512), made(512))
        gather = (first, index, *norm, made(196, 512), 1e-5)
        weights = (made(8, 196), made(8, 196), made())
        with recorded() as launches:
            match_argmax(made(8, 196, 392), made(8, 512, 392), 0.05)
            gather_norm(first, index, *norm, 1e-5)
            mixed = gather_norm_mix(*gather)
            gather_norm_mix_backward([mixed], *gather, [], [True] * 5 + [False])
            out = add_weighted_halves(tokens, *weights)
            add_weighted_halves_backward([out], tokens, *weights, [], [True] * 4)
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape="paper")
