"""AoMoA's forward pass in Triton: memory, the launches and the vendor's products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import architecture, launch
from spectralx_kernels.aomoa import triton_mixture as mixture
from spectralx_kernels.aomoa import triton_products as products
from spectralx_kernels.aomoa import triton_whole as whole
from spectralx_kernels.aomoa.triton_layer import (
    MANY,
    ONES,
    SMALL,
    Layer,
    Prepared,
    Tiles,
    padded,
    prepare,
    wide_mm,
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


def _forward_tiles(layer: Layer) -> Tiles:
    if not layer.large:
        return SMALL
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
        wide_mm(rows, prepared.folded.t()), prepared.column_sums, prepared.shift,
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
