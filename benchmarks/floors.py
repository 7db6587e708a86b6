"""The work that no implementation can avoid: bare matrix products, or a copy of the bytes.

A floor is a list of products (sizes only: the operands are random and kept between calls) and a
number of bytes that must be read or written once. Both are measured, in the same run; the slower
one is the ``floor`` row. Element-wise work, softmaxes, norms, layout changes and launches are left
out: a floor is not reachable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.case import Draw, Setting
from benchmarks.shapes import (
    FORWARD,
    STEM_WIDTH,
    TRAINING,
    AomoaShape,
    DecoderShape,
    HeadShape,
    HypertShape,
    MatchShape,
    StepShape,
    UpsampleConvShape,
)


@dataclass(frozen=True)
class Product:
    """`count` times `batch` products [m, k] x [k, n]."""

    m: int
    k: int
    n: int
    batch: int = 1
    count: int = 1

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.k * self.n * self.batch * self.count


def trained(products: Iterable[Product]) -> list[Product]:
    """Forward, and backward to both operands: each of the three has the same operations."""
    return [
        direction
        for p in products
        for direction in (p, replace(p, k=p.n, n=p.k), replace(p, m=p.n, k=p.m, n=p.k))
    ]


def frozen(products: Iterable[Product]) -> list[Product]:
    """Forward, and backward to the input only."""
    return [direction for p in products for direction in (p, replace(p, k=p.n, n=p.k))]


def bare_products(products: Iterable[Product], setting: Setting) -> Callable[[], None]:
    """A function that runs `products` on random operands, into results that are made now.

    All of them use the same three blocks of memory, each as large as its largest tensor.
    """
    products = list(products)
    draw = Draw(setting, seed=7)
    left = draw.normal(max(p.batch * p.m * p.k for p in products))
    right = draw.normal(max(p.batch * p.n * p.k for p in products))
    result = left.new_empty(max(p.batch * p.m * p.n for p in products))

    def part(block: torch.Tensor, batch: int, rows: int, columns: int) -> torch.Tensor:
        matrices = block[: batch * rows * columns].view(batch, rows, columns)
        return matrices[0] if batch == 1 else matrices

    work = [
        (
            part(left, p.batch, p.m, p.k),
            part(right, p.batch, p.n, p.k).transpose(-1, -2),
            part(result, p.batch, p.m, p.n),
            p.count,
        )
        for p in products
    ]

    def run() -> None:
        for a, b, out, count in work:
            for _ in range(count):
                torch.matmul(a, b, out=out)

    return run


def copy_of(nbytes: int, setting: Setting) -> Callable[[], None]:
    """A function that reads and writes `nbytes` in all: a copy of half as many."""
    source = Draw(setting, seed=8).normal(max(nbytes // 2 // setting.dtype.itemsize, 1))
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run


class Floor(dict[str, Callable[[], None]]):
    """Candidates for a floor by name, with the `operations` and `nbytes` of the work."""

    def __init__(
        self, candidates: Mapping[str, Callable[[], None]], operations: int, nbytes: int
    ) -> None:
        super().__init__(candidates)
        self.operations, self.nbytes = operations, nbytes


def floor_of(products: Iterable[Product], elements: int, setting: Setting) -> Floor:
    """The candidates for a floor; `elements` are read or written once in the setting's dtype."""
    products, nbytes = list(products), elements * setting.dtype.itemsize
    candidates = {"products": bare_products(products, setting)} if products else {}
    candidates["copy"] = copy_of(nbytes, setting)
    return Floor(candidates, sum(product.operations for product in products), nbytes)


def linear(shape: AomoaShape) -> Product:
    """The frozen linear layer alone."""
    return Product(shape.tokens, shape.in_features, shape.out_features)


def aomoa(shape: AomoaShape, mode: str) -> list[Product]:
    """The frozen linear layer, down, up, and `top_k` experts a token."""
    rows = shape.tokens * shape.attributes
    low_rank = [
        Product(rows, shape.in_features // shape.attributes, shape.rank),
        Product(rows, shape.rank, shape.out_features // shape.attributes),
        Product(rows * shape.top_k // shape.experts, shape.rank, shape.hidden, count=shape.experts),
        Product(rows * shape.top_k // shape.experts, shape.hidden, shape.rank, count=shape.experts),
    ]
    if mode == FORWARD:
        return [linear(shape), *low_rank]
    return frozen([linear(shape)]) + trained(low_rank)


def block(
    tokens: int, width: int, heads: int, *, batch: int, window: int | None = None
) -> list[Product]:
    """A transformer block: qkv, attention over `window` tokens (all by default), proj, MLP 4x."""
    window = window or tokens
    rows, groups = batch * tokens, batch * tokens // window * heads
    return [
        Product(rows, width, 3 * width),
        Product(window, width // heads, window, batch=groups),
        Product(window, window, width // heads, batch=groups),
        Product(rows, width, width),
        Product(rows, width, 4 * width),
        Product(rows, 4 * width, width),
    ]


def hypert_parts(shape: HypertShape) -> dict[str, list[Product]]:
    """The forward products of the tokenizer by part, in the order they run."""
    b, side, width, half = shape.batch, shape.image_size, shape.embed_dim, shape.embed_dim // 2
    tokens, positions = shape.tokens, shape.positions
    window = max(shape.image_size // 8 // 2, 1) ** 2
    # Few bands: the lift folds into the 3x3 convolution.
    inside = min(shape.bands + 1, 64)

    def matching(count: int, features: int) -> list[Product]:
        inner = features // 2
        return [
            Product(tokens, half, inner),
            Product(b * count, features, 2 * inner),
            Product(tokens, inner, count, batch=b),
            Product(tokens, count, inner, batch=b),
            Product(b * tokens, inner, half),
        ]

    return {
        "stem": [
            Product(b * side**2, shape.bands, 64),
            Product(b * side**2, inside * 9, 64),
            Product(b * (side // 2) ** 2, 64 * 4, 128),
            Product(b * (side // 2) ** 2, 128 * 9, 128),
            Product(b * (side // 4) ** 2, 128 * 4, 256),
            Product(b * positions, 256 * 9, STEM_WIDTH),
        ],
        "spatial block": block(positions, STEM_WIDTH, 8, batch=b, window=window),
        "spectral block": block(STEM_WIDTH, positions, 8, batch=b),
        "spatial match": matching(positions, STEM_WIDTH),
        "spectral match": matching(STEM_WIDTH, positions),
        "feed-forward": [
            Product(b * tokens, width, 4 * width),
            Product(b * tokens, 4 * width, width),
        ],
        "low-rank path": [
            Product(b * (side // 4) ** 2, shape.bands * 16, 16),
            Product(b * tokens, 16 * 16, width),
        ],
    }


def hypert(shape: HypertShape, mode: str) -> list[Product]:
    """Stem, both branches, attribute match, feed-forward, and the low-rank path."""
    products: list[Product] = []
    for part, found in hypert_parts(shape).items():
        trains = mode != FORWARD and (part == "low-rank path" or shape.trainable == "all")
        products += trained(found) if trains else found
    return products


def match(shape: MatchShape) -> list[Product]:
    """The scores."""
    return [Product(shape.queries, shape.width, shape.keys, batch=shape.batch)]


def upsample_conv(shape: UpsampleConvShape, mode: str) -> list[Product]:
    """The nine products on the small map: a 1 x 1 product commutes with interpolation."""
    nine = [Product(shape.batch * shape.low**2, shape.in_channels, 9 * shape.out_channels)]
    return nine if mode == FORWARD else trained(nine)


def decoder(shape: DecoderShape, mode: str) -> list[Product]:
    """UPerNet with every convolution of an upsampled map taken on the small one."""
    b, w, h, side = shape.batch, shape.width, shape.head_width, shape.side
    sides = (4 * side, 2 * side, side, side // 2)
    areas = [b * s**2 for s in sides]
    products = [
        Product(b * side**2, w, w, count=4),
        *(Product(b * side**2, w, 9 * w) for _ in range(2)),
        *(Product(area, 9 * w, w) for area in areas[2:]),
        *(Product(b * s**2, w, h) for s in (1, 2, 3, 6)),
        Product(areas[3], 9 * (w + 4 * h), h),
        *(Product(area, w, h) for area in areas[:3]),
        *(Product(area, 9 * h, h) for area in areas[:3]),
        Product(areas[0], 9 * h, h),
        *(Product(area, h, 9 * h) for area in areas[1:]),
        Product(areas[0], h, shape.classes),
    ]
    return products if mode == FORWARD else trained(products)


def _blocks(
    shape: StepShape, tokens: int, *, width: int, heads: int, depth: int, adapted: int
) -> list[Product]:
    """Frozen transformer blocks on `tokens` an image, `adapted` of them with adapters."""
    layers = block(tokens, width, heads, batch=shape.batch)
    attention = (1, 2)  # scores and values: both operands have gradients
    there_and_back = [
        direction
        for place, product in enumerate(layers)
        for direction in (trained([product]) if place in attention else frozen([product]))
    ]
    work = [replace(product, count=depth) for product in there_and_back]
    for ins, outs in ((width, 4 * width), (4 * width, width)):
        layer = AomoaShape(name="", tokens=shape.batch * tokens, in_features=ins, out_features=outs)
        # The frozen layer itself, forward and back, is in `layers`.
        adapter = aomoa(layer, TRAINING)[2:]
        work += [replace(product, count=product.count * adapted) for product in adapter]
    return work


def step(shape: StepShape, tokenizer: HypertShape, head: DecoderShape) -> list[Product]:
    """A step of stage 2: backbone with frozen weights, adapters, tokenizer, match and decoder."""
    tokens, adapted = tokenizer.tokens, len(shape.blocks)
    work = _blocks(
        shape, tokens + 1, width=shape.embed_dim, heads=shape.num_heads, depth=shape.depth,
        adapted=adapted,
    )  # fmt: skip
    for keys, features in ((tokenizer.positions, STEM_WIDTH), (STEM_WIDTH, tokenizer.positions)):
        work.append(Product(tokens, features // 2, keys, batch=shape.batch, count=adapted))
    return work + hypert(tokenizer, TRAINING) + decoder(head, TRAINING)


def satmaepp_head(shape: StepShape | HeadShape, mode: str) -> list[Product]:
    """SatMAE++'s upsampling block, all of which trains; 3x3 convolutions by definition."""
    bands, pixels = shape.bands, shape.batch * shape.image_size**2
    wide = 4 * bands
    products = [
        Product(pixels, bands, wide),
        Product(pixels, wide, wide, count=16),
        Product(4 * pixels, wide, wide, count=18),
        Product(4 * pixels, wide, bands, count=9),
    ]
    return products if mode == FORWARD else trained(products)


def scalemae_head(shape: StepShape | HeadShape, mode: str) -> list[Product]:
    """ScaleMAE's pyramid and both heads, frozen but for the last layer of each."""
    width = 512
    grid, half = (shape.image_size // 16) ** 2 * shape.batch, width // 2
    products = [Product(grid, width, 4 * width, count=2), Product(4 * grid, width, 4 * width)]
    last = []
    for pixels in (16 * grid, 4 * grid):
        products += [
            Product(pixels, width, width, count=3),
            Product(pixels, half, width, count=2),
            Product(pixels, width, 16 * half),
            Product(16 * pixels, half // 2, half),
        ]
        last.append(Product(16 * pixels, half, 4 * shape.bands))
    return products + last if mode == FORWARD else frozen(products) + trained(last)


def reconstruction_step(shape: StepShape, tokenizer: HypertShape) -> list[Product]:
    """A step of stage 1: tokenizer, encoder of a quarter of the tokens, decoder and head."""
    scalemae = shape.family == "scalemae"
    depth, tokens = (3, tokenizer.tokens) if scalemae else (8, tokenizer.tokens + 1)
    return [
        *hypert(tokenizer, TRAINING),
        *_blocks(
            shape, tokenizer.tokens // 4 + 1, width=shape.embed_dim, heads=shape.num_heads,
            depth=shape.depth, adapted=len(shape.blocks),
        ),
        *_blocks(shape, tokens, width=512, heads=16, depth=depth, adapted=depth),
        *(scalemae_head if scalemae else satmaepp_head)(shape, TRAINING),
    ]  # fmt: skip
