"""AoMoA in Triton: memory, the launches and the vendor's products, forward and backward.

Kernels are in the files ``triton_*.py``; what is launched and why is in README.md. Nothing here
waits for the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import ARCHITECTURES, Compilation, architecture, launch, recorded
from spectralx_kernels.aomoa import triton_gradients as gradients
from spectralx_kernels.aomoa.triton_backward import mixture_backward
from spectralx_kernels.aomoa.triton_dense_backward import dense_backward
from spectralx_kernels.aomoa.triton_forward import aomoa
from spectralx_kernels.aomoa.triton_layer import (
    FLAT,
    MANY,
    SMALL,
    Arguments,
    Layer,
    Prepared,
    Tiles,
    padded,
    prepare,
    unproven,
    wide_mm,
)

__all__ = ["aomoa", "aomoa_backward", "compilations"]


def _backward_tiles(layer: Layer) -> Tiles:
    if not layer.large:
        return SMALL
    if layer.rank <= 128:
        return Tiles(16, 128, 64, joint=128)
    return Tiles(16, 64, 64, joint=128, warps=8 if layer.registers else 4)


# Columns of z and of its gradient that a tile of `dense_backward` holds at most.
_Z_COLUMNS = 256 if INTERPRETED else 128


def _gradient_tiles(layer: Layer) -> Tiles:
    if not layer.large:
        return SMALL
    before = architecture() < 90  # longer tiles spill there
    if layer.registers and layer.hidden > 16:
        return Tiles(32, 32 if before else 64, 64, warps=8)
    return Tiles(32 if before else 64, 64, 64)


# Parts of the rows whose weight gradients are summed apart: enough programs to fill a GPU.
_SPLITS = 32
_SPLIT_ROWS = 128  # of a part at least
_PROGRAMS = 1024


class _Rows(NamedTuple):
    """What ``mixture_backward`` leaves for what follows."""

    mixed_grad: Tensor  # [A, T, r]
    hidden_rows: Tensor  # [R, E, h]
    hidden_grad: Tensor  # [R, E, h]
    combined: Tensor  # [R, r]
    mixed: Tensor  # [T, A, r]
    router_grad: Tensor  # [R, 2 E]
    normed_grad: Tensor  # [R, r]
    row_terms: Tensor  # [R, 2]
    norm_partial: Tensor  # [tiles, A, 4, r]
    noise_grad: Tensor | None  # [A, T, E]


def _through_the_mixture(
    layer: Layer, prepared: Prepared, saved: Sequence[Tensor], by_attribute: Tensor,
    gates_grad: Tensor | None, load_grad: Tensor | None, wants_noise: bool,
) -> _Rows:  # fmt: skip
    given = layer.given
    attributes, tokens, rank, rows = layer.attributes, layer.tokens, layer.rank, layer.rows
    tiles = _backward_tiles(layer)
    grid = layer.grid(tiles.tokens)
    combined = layer.wide(tokens, attributes, rank)
    scratch: tuple[Tensor | None, ...]
    back = _Rows(
        mixed_grad=torch.bmm(by_attribute, prepared.right),
        hidden_rows=layer.plain(rows, layer.experts, layer.hidden),
        hidden_grad=layer.plain(rows, layer.experts, layer.hidden),
        combined=combined,
        mixed=layer.plain(tokens, attributes, rank) if layer.narrow else combined,
        router_grad=layer.plain(rows, 2 * layer.experts),
        normed_grad=layer.plain(rows, rank),
        row_terms=layer.wide(rows, 2),
        norm_partial=layer.wide(grid[0], attributes, 4, rank),
        noise_grad=layer.wide(attributes, tokens, layer.experts) if wants_noise else None,
    )
    meta = layer.tiles(tiles)
    if layer.registers:
        meta["BZ"] = min(padded(rank), _Z_COLUMNS)
        del meta["EP"], meta["DENSE"]
        scratch = (
            layer.wide(rows, 2 * layer.experts),
            None if meta["BZ"] >= rank else layer.wide(rows, rank),
        )
    else:
        scratch = (layer.wide(rows, rank),)
    launch(
        dense_backward if layer.registers else mixture_backward, grid,
        *saved, given.norm2_weight, given.norm2_bias, given.gate, given.gate_noise, layer.noise,
        given.fc1_weight, given.fc1_bias, given.fc2_weight, given.fc2_bias,
        prepared.column_sums, prepared.shift, back.mixed_grad, gates_grad, load_grad,
        back.hidden_rows, back.hidden_grad, back.combined, back.mixed, back.router_grad,
        back.noise_grad, *scratch, back.normed_grad, back.row_terms, back.norm_partial,
        tokens, attributes, layer.width, rank, layer.hidden,
        EXPERTS=layer.experts, TOP_K=given.top_k, NOISY=given.noise is not None, **meta,
    )  # fmt: skip
    return back


def _part_size(layer: Layer) -> int:
    e, r, h = layer.experts, layer.rank, layer.hidden
    return 2 * e * r * h + e * (r + h) + 2 * layer.attributes * e * r + 4 * r


def _splits(layer: Layer, programs: int) -> int:
    """Parts of the rows; a power of two, as the number is compiled in."""
    finer = 2 if layer.registers else 1
    parts = triton.cdiv(layer.rows, _SPLIT_ROWS // finer)
    wanted = min(_SPLITS * finer, _PROGRAMS // programs, parts)
    return int(2 ** (max(wanted, 1).bit_length() - 1))


def _weight_parts(layer: Layer, back: _Rows, normed: Tensor, gates: Tensor) -> Tensor:
    """[splits, size]: sums over fixed parts of the rows, laid out as `weight_gradients` says."""
    given = layer.given
    meta = layer.tiles(_gradient_tiles(layer))
    chunks = triton.cdiv(layer.rank, meta["BC"])
    groups = layer.experts * triton.cdiv(layer.hidden, meta["BH"]) + layer.attributes + 1
    splits = _splits(layer, chunks * groups)
    parts = layer.wide(splits, _part_size(layer))
    tiles = back.norm_partial.shape[0] * layer.attributes
    meta["EP2"] = padded(2 * layer.experts)
    meta["DENSE"] = layer.registers and meta["BH"] >= layer.hidden
    del meta["EP"], meta["BN"]
    launch(
        gradients.weight_gradients, (chunks, groups, splits),
        normed, given.norm2_weight, given.norm2_bias, gates, given.fc2_weight, given.fc2_bias,
        back.combined, back.mixed_grad, back.hidden_rows, back.hidden_grad, back.router_grad,
        back.norm_partial, parts,
        layer.tokens, triton.cdiv(layer.rows, splits), tiles, triton.cdiv(tiles, splits),
        layer.attributes, layer.rank, layer.hidden,
        EXPERTS=layer.experts, SIZE=parts.shape[1], **meta,
    )  # fmt: skip
    return parts


# What `finish` writes, in the order it takes them.
_FINISHED = (
    "x", "scaler", "norm1_weight", "norm1_bias", "down", "norm2_weight", "norm2_bias", "gate",
    "gate_noise", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "up",
)  # fmt: skip
_FROM_PARTS = frozenset(_FINISHED) - {"x", "scaler", "up"}


def aomoa_backward(output_grads: Sequence[Tensor | None], *values: Any) -> list[Tensor]:
    """The gradients wanted, in order: output_grads, the inputs, saved, mask."""
    *inputs, saved, mask = values
    layer = Layer(inputs)
    given = layer.given
    tokens, attributes = layer.tokens, layer.attributes
    names = [name for name, wanted in zip(Arguments._fields, mask, strict=True) if wanted]
    if tokens == 0:
        return [torch.zeros_like(getattr(given, name)) for name in names]
    out_grad = output_grads[0]
    if out_grad is None:
        out_grad = given.x.new_zeros(tokens, attributes * layer.out)
    out_grad = out_grad.contiguous()
    gates_grad, load_grad = (
        None if grad is None else grad.float().contiguous() for grad in output_grads[1:]
    )
    saved = [tensor.contiguous() for tensor in saved]  # gates, normed, statistics
    grads: dict[str, Tensor | None] = dict.fromkeys(Arguments._fields)
    if "weight" in names:
        grads["weight"] = out_grad.t() @ given.x
    if "bias" in names:
        grads["bias"] = out_grad.sum(0)

    prepared = prepare(layer, counts=False)
    by_attribute = out_grad.view(tokens, attributes, layer.out).transpose(0, 1)  # [A, T, o]
    back = _through_the_mixture(
        layer, prepared, saved, by_attribute, gates_grad, load_grad, "noise" in names
    )
    if back.noise_grad is not None and given.noise is not None:
        grads["noise"] = back.noise_grad.to(given.noise.dtype)
    parts = None
    if _FROM_PARTS.intersection(names):
        parts = _weight_parts(layer, back, saved[1], saved[0])
    up_products = down_products = None
    if "up" in names or "scaler" in names:
        up_products = wide_mm(by_attribute.transpose(1, 2), back.mixed.transpose(0, 1))
    if {"down", "norm1_weight", "norm1_bias"}.intersection(names):
        down_products = wide_mm(back.normed_grad.t(), given.x.view(layer.rows, layer.width))
    for name in _FINISHED:
        if name in names and name != "x":
            grads[name] = torch.empty_like(getattr(given, name))
    if "x" in names:
        grads["x"] = x_grad = out_grad @ given.weight
        x_grad.view(layer.rows, layer.width).addmm_(back.normed_grad, prepared.folded)
    _finish(layer, back, parts, up_products, down_products, grads)
    return [grad for name in names if (grad := grads[name]) is not None]


def _finish(
    layer: Layer, back: _Rows, parts: Tensor | None, up_products: Tensor | None,
    down_products: Tensor | None, grads: dict[str, Tensor | None],
) -> None:  # fmt: skip
    given = layer.given
    columns = 16  # of a program of norm1's gradients
    x_programs = 0 if grads["x"] is None else triton.cdiv(given.x.numel(), FLAT)
    part_programs = 0 if parts is None else triton.cdiv(_part_size(layer), FLAT)
    down_programs = 0 if grads["down"] is None else layer.rank
    norm_programs = 0 if down_products is None else triton.cdiv(layer.width, columns)
    up_programs = 0 if up_products is None else layer.out
    programs = x_programs + part_programs + down_programs + norm_programs + up_programs
    if programs == 0:
        return
    launch(
        gradients.finish, (programs,),
        given.x, given.scaler, given.norm1_weight, given.norm1_bias, given.down, given.up,
        back.row_terms, parts, up_products, down_products, *(grads[name] for name in _FINISHED),
        layer.rows, 1 if parts is None else parts.shape[0], x_programs,
        part_programs, down_programs, norm_programs,
        layer.attributes, layer.width, layer.out, layer.rank, layer.hidden,
        EXPERTS=layer.experts, SIZE=_part_size(layer), BLOCK=FLAT, BJ=128, BW=columns,
    )  # fmt: skip


# The paper's two layers, and one of no round size with a hidden layer of one.
_SHAPES = {
    "fc1": {"width": 1024, "out": 4096, "rank": 128, "hidden": 16, "experts": 4, "attributes": 2},
    "fc2": {"width": 4096, "out": 1024, "rank": 512, "hidden": 64, "experts": 4, "attributes": 2},
    "odd": {"width": 75, "out": 33, "rank": 19, "hidden": 1, "experts": 5, "attributes": 3},
}


def _example(
    dtype: torch.dtype, tokens: int, width: int, out: int, rank: int, hidden: int, experts: int,
    attributes: int,
) -> Arguments:  # fmt: skip
    d = width // attributes
    shapes = (
        (tokens, width), (out, width), (out,), (out,), (d,), (d,), (rank, d), (rank,), (rank,),
        (attributes, rank, experts), (attributes, rank, experts), (attributes, tokens, experts),
        (experts, hidden, rank), (experts, hidden), (experts, rank, hidden), (experts, rank),
        (out // attributes, rank),
    )  # fmt: skip
    tensors: list[Any] = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    return Arguments(*[*tensors, min(2, experts), 1e-5])


def compilations() -> Iterator[Compilation]:
    """What both passes compile, for few and for many tokens, with what no GPU has run yet: every
    type at fc2 and, in bfloat16, at the other shapes."""
    cases = [("bfloat16", name) for name in _SHAPES] + [("float32", "fc2"), ("float16", "fc2")]
    for (dtype, name), assumed in itertools.product(cases, ARCHITECTURES):
        seen = set()
        for tokens, new in itertools.product((394, MANY), (False, True)):
            given = _example(getattr(torch, dtype), tokens, **_SHAPES[name])
            with unproven(new):
                launches = _launches(given, assumed)
            for found in launches:
                # Numbers of tokens are no part of what is compiled.
                sizes = [
                    found.arguments[parameter.name]
                    for parameter in found.kernel.params
                    if parameter.is_constexpr and parameter.name in found.arguments
                ]
                given_none = [name for name, value in found.arguments.items() if value is None]
                key = (found.kernel.__name__, *sizes, *given_none, *found.options.values())
                if key not in seen:
                    seen.add(key)
                    yield found._replace(dtype=dtype, shape=name, architectures=(assumed,))


def _launches(given: Arguments, assumed: int) -> list[Compilation]:
    """Of both passes, with every gradient but the frozen layer's."""
    with recorded(assumed) as launches:
        out, gates, load, normed, statistics = aomoa(*given)
        mask = [name not in ("weight", "bias") for name in Arguments._fields[:-2]]
        saved = [gates, normed, statistics]
        aomoa_backward([out, gates, load], *given, saved, [*mask, False, False])
    return launches
