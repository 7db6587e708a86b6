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
from spectralx_kernels.aomoa import triton_mixture as mixture
from spectralx_kernels.aomoa import triton_products as products
from spectralx_kernels.aomoa import triton_whole as whole
from spectralx_kernels.aomoa.triton_backward import mixture_backward
from spectralx_kernels.aomoa.triton_layer import (
    FLAT,
    MANY,
    ONES,
    Arguments,
    Layer,
    Prepared,
    Tiles,
    padded,
    prepare,
    unproven,
)

# Columns of the rank that a tile of the down product holds at most: on sm_90 all of the paper's,
# which elsewhere spills.
_DOWN_COLUMNS, _DOWN_COLUMNS_ON_90 = 256, 512


def _down(layer: Layer, prepared: Prepared, statistics: Tensor, normed: Tensor) -> None:
    most = _DOWN_COLUMNS_ON_90 if architecture() == 90 else _DOWN_COLUMNS
    columns = min(padded(layer.rank), most)
    tile = 64 if layer.large or INTERPRETED else 16
    launch(
        products.down_norm, layer.grid(tile),
        layer.given.x, prepared.folded, prepared.column_sums, prepared.shift, statistics, normed,
        layer.tokens, layer.attributes, layer.width, layer.rank, layer.given.norm_eps,
        SHIFTED=not layer.narrow, WHOLE=columns >= layer.rank, BM=tile, BN=columns,
        BK=64 if layer.large and columns <= 128 else 32,
        num_warps=16 if columns > 256 else 8,
        num_stages=3 if layer.large else 2,
    )  # fmt: skip


# The interpreter's time goes by operations, whatever their size.
_SMALL = Tiles(64, 256, 64) if INTERPRETED else Tiles(32, 32, 32, joint=32, warps=8)


def _forward_tiles(layer: Layer) -> Tiles:
    if not layer.large:
        return _SMALL
    # Longer tiles read less of the experts' weights, which are few where the rank is small.
    return Tiles(32 if layer.tokens >= MANY and layer.rank > 128 else 16, 64, 64)


def aomoa(*values: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, gates, load, and normed and statistics for backward: ``reference.aomoa_saving``."""
    layer = Layer(values)
    attributes, tokens, experts = layer.attributes, layer.tokens, layer.experts
    kept = _Kept(
        gates=layer.wide(attributes, tokens, experts),
        load=layer.wide(attributes, experts),
        normed=layer.wide(tokens, attributes, layer.rank),
        statistics=layer.wide(3, attributes, tokens),
    )
    if tokens == 0:
        return _frozen(layer), kept.gates, kept.load.zero_(), kept.normed, kept.statistics
    small = layer.whole and padded(layer.rank) <= _IN_ONE
    if small and layer.joint:
        return _joint(layer, kept), *kept
    out = _frozen(layer)
    mixed = layer.plain(tokens, attributes, layer.rank)
    if small:
        prepared = prepare(layer, counts=True)
        _adapt(layer, prepared, kept, mixed, attributes * layer.rank, layer.rank, None)
    elif layer.whole:
        prepared = prepare(layer, counts=True, statistics=kept.statistics)
        _adapt_product(layer, prepared, kept, mixed)
    else:
        prepared = prepare(layer, counts=True)
        _down(layer, prepared, kept.statistics, kept.normed)
        _mix(layer, prepared, kept, mixed)
    by_attribute = out.view(tokens, attributes, layer.out).transpose(0, 1)
    by_attribute.baddbmm_(mixed.transpose(0, 1), prepared.right.transpose(1, 2))
    return out, *kept


class _Kept(NamedTuple):
    """What forward returns beside its output."""

    gates: Tensor  # [A, T, E]
    load: Tensor  # [A, E]
    normed: Tensor  # [T, A, r]
    statistics: Tensor  # [3, A, T]


def _frozen(layer: Layer) -> Tensor:
    given = layer.given
    frozen = given.weight.t()
    return given.x @ frozen if given.bias is None else torch.addmm(given.bias, given.x, frozen)


def _mix(layer: Layer, prepared: Prepared, kept: _Kept, mixed: Tensor) -> None:
    given = layer.given
    tiles = _forward_tiles(layer)
    grid = layer.grid(tiles.tokens)
    launch(
        mixture.mixture, grid,
        kept.normed, given.norm2_weight, given.norm2_bias, given.gate, given.gate_noise,
        layer.noise, given.fc1_weight, given.fc1_bias, given.fc2_weight, given.fc2_bias,
        kept.gates, layer.wide(grid[0], layer.attributes, layer.experts), kept.load,
        prepared.counter, layer.plain(layer.rows, layer.experts, layer.hidden), mixed,
        layer.tokens, layer.attributes, layer.rank, layer.hidden,
        EXPERTS=layer.experts, TOP_K=given.top_k, NOISY=given.noise is not None,
        **layer.tiles(tiles),
    )  # fmt: skip


_IN_ONE = 128  # rank up to which the down product is in the same program


def _whole_tiles(layer: Layer) -> Tiles:
    return Tiles(64, 0, 64) if INTERPRETED else Tiles(16, 0, 64, stages=3)


def _adapt(
    layer: Layer, prepared: Prepared, kept: _Kept, mixed: Tensor, row: int, step: int,
    beside: Tensor | None,
) -> None:  # fmt: skip
    """`whole.adapt`: the log-sum-exp to `mixed`, rows `row` apart and attributes `step`."""
    given = layer.given
    tiles = _whole_tiles(layer)
    grid = layer.grid(tiles.tokens)
    launch(
        whole.adapt, grid,
        given.x, prepared.folded, prepared.column_sums, prepared.shift, given.norm2_weight,
        given.norm2_bias, given.gate, given.gate_noise, layer.noise, given.fc1_weight,
        given.fc1_bias, given.fc2_weight, given.fc2_bias,
        kept.statistics, kept.normed, kept.gates,
        layer.wide(grid[0], layer.attributes, layer.experts), kept.load, prepared.counter, mixed,
        beside, layer.tokens, layer.attributes, layer.width, layer.rank, layer.hidden,
        given.norm_eps, ROW=row, STEP=step, ONES=ONES, EXPERTS=layer.experts, TOP_K=given.top_k,
        NOISY=given.noise is not None, SHIFTED=not layer.narrow, BM=tiles.tokens,
        BR=padded(layer.rank), BK=tiles.hidden, BH=padded(layer.hidden), EP=layer.padded_experts,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _product_tiles(layer: Layer) -> Tiles:
    if INTERPRETED:
        return Tiles(64, 512, 512, joint=256)
    return Tiles(16, 64, 256, joint=256, warps=8, stages=2)


def _adapt_product(layer: Layer, prepared: Prepared, kept: _Kept, mixed: Tensor) -> None:
    """`whole.adapt_product` behind the vendor's down product."""
    given = layer.given
    rows = given.x.view(layer.rows, layer.width)
    if not layer.narrow:
        # float32 keeps its digits where a row's mean is far from 0.
        rows = rows - kept.statistics[0].t().reshape(-1, 1)
    tiles = _product_tiles(layer)
    grid = layer.grid(tiles.tokens)
    launch(
        whole.adapt_product, grid,
        _wide_mm(rows, prepared.folded.t()), prepared.column_sums, prepared.shift,
        given.norm2_weight, given.norm2_bias, given.gate, given.gate_noise, layer.noise,
        given.fc1_weight, given.fc1_bias, given.fc2_weight, given.fc2_bias,
        kept.statistics, kept.normed, kept.gates,
        layer.wide(grid[0], layer.attributes, layer.experts), kept.load, prepared.counter,
        layer.plain(layer.rows, layer.rank), layer.plain(layer.rows, layer.experts, layer.hidden),
        mixed, layer.tokens, layer.attributes, layer.rank, layer.hidden, given.norm_eps,
        CENTRED=not layer.narrow, EXPERTS=layer.experts, TOP_K=given.top_k,
        NOISY=given.noise is not None, BM=tiles.tokens, BR=padded(layer.rank),
        BC=min(padded(layer.rank), tiles.columns),
        BN=min(padded(layer.experts * layer.hidden), tiles.joint), BH=padded(layer.hidden),
        BY=min(padded(layer.rank), tiles.hidden), EP=layer.padded_experts,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _joint(layer: Layer, kept: _Kept) -> Tensor:
    """The output as one product: of [c_0 | x | 1, 0 ... | c_1] every attribute takes a window, with
    up, the frozen weight and the bias as `prepare` lays them out."""
    rank, width = layer.rank, layer.in_width
    columns = rank + width + ONES
    step = columns if layer.attributes == 2 else 0
    prepared = prepare(layer, counts=True, joint=True)
    left = layer.plain(layer.tokens, columns + (rank if step else 0))
    row = left.shape[1]
    _adapt(layer, prepared, kept, left, row, step, left[:, rank:])
    windows = left.as_strided((layer.attributes, layer.tokens, columns), (rank, row, 1))
    out = layer.plain(layer.tokens, layer.attributes, layer.out)
    torch.bmm(windows, prepared.right.transpose(1, 2), out=out.transpose(0, 1))
    return out.view(layer.tokens, -1)


def _backward_tiles(layer: Layer) -> Tiles:
    return Tiles(16, 128 if layer.rank <= 128 else 64, 64, joint=128) if layer.large else _SMALL


def _gradient_tiles(layer: Layer) -> Tiles:
    # Longer tiles spill before sm_90.
    return Tiles(64 if architecture() >= 90 else 32, 64, 64) if layer.large else _SMALL


# Parts of the rows whose weight gradients are summed apart: enough programs to fill a GPU.
_SPLITS = 32
_SPLIT_ROWS = 128  # of a part at least
_PROGRAMS = 1024


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """A product, of matrices or batches, accumulated and kept in float32."""
    product = torch.mm if a.dim() == 2 else torch.bmm
    if a.is_cuda and a.dtype != torch.float32:
        return product(a, b, out_dtype=torch.float32)
    return product(a, b).float()


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
    launch(
        mixture_backward, grid,
        *saved, given.norm2_weight, given.norm2_bias, given.gate, given.gate_noise, layer.noise,
        given.fc1_weight, given.fc1_bias, given.fc2_weight, given.fc2_bias,
        prepared.column_sums, prepared.shift, back.mixed_grad, gates_grad, load_grad,
        back.hidden_rows, back.hidden_grad, back.combined, back.mixed, back.router_grad,
        back.noise_grad, layer.wide(rows, rank), back.normed_grad, back.row_terms,
        back.norm_partial,
        tokens, attributes, layer.width, rank, layer.hidden,
        EXPERTS=layer.experts, TOP_K=given.top_k, NOISY=given.noise is not None,
        **layer.tiles(tiles),
    )  # fmt: skip
    return back


def _part_size(layer: Layer) -> int:
    e, r, h = layer.experts, layer.rank, layer.hidden
    return 2 * e * r * h + e * (r + h) + 2 * layer.attributes * e * r + 4 * r


def _splits(rows: int, programs: int) -> int:
    """Parts of the rows; a power of two, as the number is compiled in."""
    wanted = min(_SPLITS, _PROGRAMS // programs, triton.cdiv(rows, _SPLIT_ROWS))
    return int(2 ** (max(wanted, 1).bit_length() - 1))


def _weight_parts(layer: Layer, back: _Rows, normed: Tensor, gates: Tensor) -> Tensor:
    """[splits, size]: sums over fixed parts of the rows, laid out as `weight_gradients` says."""
    given = layer.given
    meta = layer.tiles(_gradient_tiles(layer))
    chunks = triton.cdiv(layer.rank, meta["BC"])
    groups = layer.experts * triton.cdiv(layer.hidden, meta["BH"]) + layer.attributes + 1
    splits = _splits(layer.rows, chunks * groups)
    parts = layer.wide(splits, _part_size(layer))
    tiles = back.norm_partial.shape[0] * layer.attributes
    meta["EP2"] = padded(2 * layer.experts)
    for name in ("EP", "BN", "DENSE"):
        del meta[name]
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
        up_products = _wide_mm(by_attribute.transpose(1, 2), back.mixed.transpose(0, 1))
    if {"down", "norm1_weight", "norm1_bias"}.intersection(names):
        down_products = _wide_mm(back.normed_grad.t(), given.x.view(layer.rows, layer.width))
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
