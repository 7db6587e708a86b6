"""HyperT's attention in Triton: memory and launches.

Kernels are in ``triton_attention.py``; what is launched and why is in README.md. Nothing here waits
for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spectralx_kernels._backends import INTERPRETED
from spectralx_kernels._triton import Compilation, launch, recorded
from spectralx_kernels.hypert import triton_attention as kernels

# Queries and keys of a tile. The interpreter's time goes by operations, not by sizes.
_TILE = 256 if INTERPRETED else 32
_DEPTH = 64  # columns of a head that one product takes; more are taken in turn
_COLUMNS = 256 if INTERPRETED else 128  # of a head that one program makes


class Geometry(NamedTuple):
    """Heads, and where queries and keys lie: sizes that are compiled in."""

    HEADS: int
    DIM: int
    QUERIES: int  # plain rows of queries; 0: the positions of the window
    ROWS: int
    COLUMNS: int
    HEIGHT: int
    WIDTH: int

    @property
    def windows(self) -> int:
        down, across = -(-self.HEIGHT // self.ROWS), -(-self.WIDTH // self.COLUMNS)
        return down * across

    @property
    def keys(self) -> int:
        return self.ROWS * self.COLUMNS

    @property
    def queries(self) -> int:
        """Queries of one window."""
        return self.QUERIES or self.keys

    def tiles(self) -> dict[str, int]:
        # A product has at least 16 of everything.
        width = max(triton.next_power_of_2(self.DIM), 16)
        return {
            "BM": min(max(triton.next_power_of_2(self.queries), 16), _TILE),
            "BN": min(max(triton.next_power_of_2(self.keys), 16), _TILE),
            "BD": min(width, _DEPTH),
            "BV": min(width, _COLUMNS),
        }

    def grid(self, images: int, count: int, tile: int, columns: int) -> tuple[int, int]:
        return (
            images * self.windows * self.HEADS,
            triton.cdiv(count, tile) * triton.cdiv(self.DIM, columns),
        )


class Attention(NamedTuple):
    """Queries, keys and values, contiguous but for their strides, and the padded position's."""

    geometry: Geometry
    images: int
    q: Tensor
    k: Tensor
    v: Tensor
    q_image: int  # elements from one image's queries to the next
    q_row: int
    k_image: int
    k_row: int
    scale: float
    padding_k: Tensor | None = None
    padding_v: Tensor | None = None

    def forward(self, out: Tensor) -> None:
        """out [.., HEADS * DIM], rows as the queries'."""
        tiles = self.geometry.tiles()
        grid = self.geometry.grid(self.images, self.geometry.queries, tiles["BM"], tiles["BV"])
        if math.prod(grid) == 0:
            return
        launch(
            kernels.attention, grid, self.q, self.k, self.v, self.padding_k, self.padding_v, out,
            self.scale, self.q_image, self.q_row, self.k_image, self.k_row,
            **self.geometry._asdict(), **tiles,
        )  # fmt: skip

    def backward(
        self, dout: Tensor, dq: Tensor, dq_row: int, dk: Tensor, dv: Tensor | None
    ) -> Tensor | None:
        """dq rows `dq_row` apart, dk and dv with the strides of k; the padded position's gradient
        [2, HEADS * DIM] in float32, if there is one."""
        tiles, geometry = self.geometry.tiles(), self.geometry
        rows = self.images * (geometry.QUERIES or geometry.HEIGHT * geometry.WIDTH)
        log_sum, slope = dout.new_empty(2, geometry.HEADS, rows, dtype=torch.float32).unbind(0)
        grid = geometry.grid(self.images, geometry.queries, tiles["BM"], tiles["BV"])
        # Two or three accumulators: more warps where four would spill.
        warps = 8 if tiles["BV"] > 64 or self.padding_k is not None else 4
        parts = None
        if self.padding_k is not None:
            count = grid[0] // geometry.HEADS * triton.cdiv(geometry.queries, tiles["BM"])
            # Zeros, as windows without padding leave theirs alone.
            parts = dout.new_zeros(count, 2, geometry.HEADS * geometry.DIM, dtype=torch.float32)
        if math.prod(grid) > 0:
            launch(
                kernels.query_gradient, grid, self.q, self.k, self.v, self.padding_k,
                self.padding_v, dout, dq, log_sum, slope, parts, self.scale, self.q_image,
                self.q_row, self.k_image, self.k_row, dq_row, rows, **geometry._asdict(), **tiles,
                num_warps=warps,
            )  # fmt: skip
            launch(
                kernels.key_gradient,
                geometry.grid(self.images, geometry.keys, tiles["BN"], tiles["BV"]),
                self.q, self.k, self.v, dout, dk, dv, log_sum, slope, self.scale, self.q_image,
                self.q_row, self.k_image, self.k_row, rows, **geometry._asdict(), **tiles,
                num_warps=warps,
            )  # fmt: skip
        return None if parts is None else parts.sum(0)


def _windows(
    qkv: Tensor, padding: Tensor | None, num_heads: int, window: Sequence[int]
) -> Attention:
    """The arguments of window_attention; qkv contiguous."""
    images, height, width, channels = qkv.shape
    third = channels // 3
    q, k, v = qkv.split(third, -1)
    geometry = Geometry(num_heads, third // num_heads, 0, window[0], window[1], height, width)
    pad_k = pad_v = None
    if padding is not None and (height % window[0] or width % window[1]):
        _, pad_k, pad_v = padding.contiguous().split(third)
    image = height * width * channels
    return Attention(
        geometry, images, q, k, v, image, channels, image, channels,
        1 / math.sqrt(geometry.DIM), pad_k, pad_v,
    )  # fmt: skip


def window_attention(
    qkv: Tensor, padding: Tensor | None, num_heads: int, window: Sequence[int]
) -> Tensor:
    """As ``reference.window_attention``; one launch."""
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    _windows(qkv.contiguous(), padding, num_heads, window).forward(out)
    return out


def _zeros(inputs: Sequence[Tensor | None], mask: Sequence[bool]) -> list[Tensor]:
    """Contiguous gradients of 0 for the inputs that want one."""
    return [
        torch.zeros_like(value, memory_format=torch.contiguous_format)
        for value, wanted in zip(inputs, mask, strict=False)
        if wanted and value is not None
    ]


def window_attention_backward(
    output_grads: Sequence[Tensor | None],
    qkv: Tensor,
    padding: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    _saved: Sequence[Tensor],
    mask: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients of qkv and padding; two launches."""
    (dout,) = output_grads
    inputs = [qkv, padding]
    if dout is None:
        return _zeros(inputs, mask)
    given = _windows(qkv.contiguous(), padding, num_heads, window)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    third = qkv.shape[-1] // 3
    dq, dk, dv = dqkv.split(third, -1)
    of_padding = given.backward(dout.contiguous(), dq, qkv.shape[-1], dk, dv)
    grads = [dqkv] if mask[0] else []
    if mask[1]:
        assert padding is not None
        whole = torch.zeros_like(padding)
        if of_padding is not None:
            whole[third:] = of_padding.flatten()
        grads.append(whole)
    return grads


class _Match(NamedTuple):
    """attribute_match with the key projection folded into the queries: attention of the folded
    queries [M, F] with normed features [B, N, F], keys and values at once."""

    attention: Attention
    normed: Tensor
    mean: Tensor
    rstd: Tensor
    key_weight: Tensor  # [d, F]
    value_weight: Tensor

    @staticmethod
    def of(
        features: Tensor,
        queries: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        kv_weight: Tensor,
        norm_eps: float,
    ) -> _Match:
        images, positions, width = features.shape
        normed, mean, rstd = torch.native_layer_norm(
            features.contiguous(), [width], norm_weight, norm_bias, norm_eps
        )
        key_weight, value_weight = kv_weight.chunk(2)
        count, inner = queries.shape
        attention = Attention(
            Geometry(1, width, count, 1, positions, 1, positions), images, queries @ key_weight,
            normed, normed, 0, width, positions * width, width, 1 / math.sqrt(inner),
        )  # fmt: skip
        return _Match(attention, normed, mean, rstd, key_weight, value_weight)

    def found(self) -> Tensor:
        """Weighted sums of normed features: [B, M, F]."""
        geometry = self.attention.geometry
        out = self.normed.new_empty(self.attention.images, geometry.QUERIES, geometry.DIM)
        if geometry.QUERIES > 0:
            self.attention.forward(out)
        return out


def attribute_match(
    features: Tensor,
    queries: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    norm_eps: float,
) -> Tensor:
    """As ``reference.attribute_match``; one launch beside the vendor's norm and two products."""
    match = _Match.of(features, queries, norm_weight, norm_bias, kv_weight, norm_eps)
    return match.found() @ match.value_weight.t()


def attribute_match_backward(
    output_grads: Sequence[Tensor | None],
    features: Tensor,
    queries: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kv_weight: Tensor,
    norm_eps: float,
    _saved: Sequence[Tensor],
    mask: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients, in order; three launches beside the vendor's."""
    (dout,) = output_grads
    if dout is None or len(queries) == 0:
        inputs = [features, queries, norm_weight, norm_bias, kv_weight]
        return _zeros(inputs, mask)
    match = _Match.of(features, queries, norm_weight, norm_bias, kv_weight, norm_eps)
    images, count, width = len(features), *match.attention.q.shape
    dq = torch.empty(images, count, width, dtype=torch.float32, device=features.device)
    dnormed = torch.empty_like(match.normed)
    match.attention.backward((dout @ match.value_weight).contiguous(), dq, width, dnormed, None)
    dfeatures, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed, features.contiguous(), [width], match.mean, match.rstd, norm_weight, norm_bias,
        [mask[0], mask[2], mask[3]],
    )  # fmt: skip
    dfolded = dq.sum(0)
    grads = [dfeatures] if mask[0] else []
    if mask[1]:
        grads.append((dfolded @ match.key_weight.float().t()).to(queries.dtype))
    grads += [grad for grad, wanted in ((dweight, mask[2]), (dbias, mask[3])) if wanted]
    if mask[4]:
        dkey = (queries.float().t() @ dfolded).to(kv_weight.dtype)
        dvalue = dout.flatten(0, 1).t() @ match.found().flatten(0, 1)
        grads.append(torch.cat([dkey, dvalue]))
    return grads


# The paper's branches, and windows that do not divide their map.
_WINDOWS = {
    "spatial": ((28, 28), 8, 64, (14, 14)),
    "spectral": ((1, 512), 8, 98, (1, 512)),
    "padded": ((25, 27), 4, 40, (12, 13)),
}


def compilations() -> Iterator[Compilation]:
    """What the operators compile: in bfloat16 at all shapes, the others at the first."""
    cases = [("bfloat16", shape) for shape in (*_WINDOWS, "match")]
    for dtype, shape in [*cases, ("float32", "spatial"), ("float16", "spatial")]:
        options: Any = {"dtype": getattr(torch, dtype), "device": "meta"}
        with recorded() as launches:
            if shape == "match":
                args = (
                    torch.empty(2, 512, 784, **options), torch.empty(196, 392, **options),
                    torch.empty(784, **options), torch.empty(784, **options),
                    torch.empty(784, 784, **options), 1e-5,
                )  # fmt: skip
                found = attribute_match(*args)
                attribute_match_backward([found], *args, [], [True] * 4 + [False] * 2)
            else:
                side, heads, dim, window = _WINDOWS[shape]
                qkv = torch.empty(2, *side, 3 * heads * dim, **options)
                padding = torch.empty(3 * heads * dim, **options)
                given = (qkv, padding, heads, window)
                found = window_attention(*given)
                window_attention_backward([found], *given, [], [True, True])
        for compiled in launches:
            yield compiled._replace(dtype=dtype, shape=shape)
