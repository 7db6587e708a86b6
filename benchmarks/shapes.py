"""The paper's shapes: one registry for the benchmarks, and for tests that want real sizes.

A shape belongs to the default run (`small`), to ``--full`` (`full`) or to both. `modes` are the
passes measured; `compiled` are those that have a ``compile`` row in the default run, where
compiling costs more time than all the measuring (``--full`` compiles everything).

Sizes are those of SpectralX (arXiv 2508.01731): ViT-L/16 at 224 x 224, so 14 x 14 tokens and a
class token, width 1024; stage 1 keeps a quarter of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

FORWARD = "fwd"
TRAINING = "fwd+bwd"
STEP = "step"
MODES = (FORWARD, TRAINING, STEP)
IMPLEMENTATIONS = ("fused", "eager", "dispatch", "compile", "floor")

WIDTH = 1024
MLP_WIDTH = 4096
SIDE = 14
TOKENS = SIDE * SIDE
STEM_SIDE = 28
STEM_WIDTH = 512

# Band centres in micrometres.
WAVELENGTHS: dict[str, tuple[float, ...]] = {
    "dfc": (0.443, 0.490, 0.560, 0.665, 0.705, 0.740, 0.783, 0.833, 0.865, 0.943, 1.380, 1.610,
            2.190),
    "mts": (0.490, 0.560, 0.665, 0.842, 1.610, 2.190) * 4,
    "whu": (0.466, 0.480, 0.500, 0.520, 0.536, 0.550, 0.566, 0.580, 0.596, 0.610, 0.626, 0.640,
            0.656, 0.670, 0.686, 0.700, 0.716, 0.730, 0.746, 0.760, 0.776, 0.790, 0.806, 0.820,
            0.836, 0.850, 0.866, 0.880, 0.896, 0.910, 0.926, 0.940),
    "landsat": (0.482, 0.561, 0.655, 0.865, 1.609, 2.201),
    "even128": tuple(round(0.4 + band * 2.1 / 127, 4) for band in range(128)),
    # EnMAP: 224 bands from 0.42 to 2.45, here evenly spaced.
    "enmap": tuple(round(0.42 + band * (2.45 - 0.42) / 223, 4) for band in range(224)),
}  # fmt: skip
# Classes of each data set, with the unlabelled one.
CLASSES = {"dfc": 9, "mts": 9, "whu": 25}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every shape has: where it runs and in which passes."""

    name: str
    small: bool = False
    full: bool = True
    modes: tuple[str, ...] = (FORWARD, TRAINING)
    compiled: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AomoaShape(Shape):
    """An adapted linear layer: x [tokens, in_features] -> [tokens, out_features]."""

    tokens: int
    in_features: int
    out_features: int
    attributes: int = 2
    experts: int = 4
    top_k: int = 2

    @property
    def rank(self) -> int:
        return self.in_features // self.attributes // 4

    @property
    def hidden(self) -> int:
        return self.in_features // self.attributes // 32


@dataclass(frozen=True, kw_only=True)
class HypertShape(Shape):
    """The tokenizer: images [batch, bands, image_size, image_size] -> tokens, 196 of 224 x 224."""

    batch: int
    sensor: str
    image_size: int = 224
    embed_dim: int = WIDTH
    trainable: str = "official"

    @property
    def bands(self) -> int:
        return len(WAVELENGTHS[self.sensor])

    @property
    def tokens(self) -> int:
        return (self.image_size // 16) ** 2

    @property
    def positions(self) -> int:
        """Positions of the stem's map."""
        return (self.image_size // 8) ** 2


@dataclass(frozen=True, kw_only=True)
class MatchShape(Shape):
    """The best query for each key: [batch, queries, width], [batch, keys, width]."""

    batch: int
    queries: int
    keys: int
    width: int


@dataclass(frozen=True, kw_only=True)
class ReconstructionShape(Shape):
    """The loss of a masked-reconstruction family on images [batch, bands, 224, 224]."""

    family: str
    batch: int
    bands: int
    image_size: int = 224
    patch: int = 16


@dataclass(frozen=True, kw_only=True)
class HeadShape(Shape):
    """The prediction head of a masked-reconstruction family: tokens [batch, 196, 512] to images."""

    family: Literal["scalemae", "satmae++"]
    batch: int
    sensor: str
    image_size: int = 224

    @property
    def bands(self) -> int:
        return len(WAVELENGTHS[self.sensor])


@dataclass(frozen=True, kw_only=True)
class UpsampleConvShape(Shape):
    """A 3 x 3 convolution of a map [batch, in, low, low] upsampled to [high, high]."""

    batch: int
    in_channels: int
    out_channels: int
    low: int
    high: int


@dataclass(frozen=True, kw_only=True)
class UpsampleCeShape(Shape):
    """Cross-entropy and prediction of logits [batch, classes, low, low] at [high, high]."""

    batch: int
    classes: int
    low: int = 56
    high: int = 224


@dataclass(frozen=True, kw_only=True)
class DecoderShape(Shape):
    """UPerNet on four maps [batch, 1024, 14, 14] -> logits [batch, classes, 56, 56]."""

    batch: int
    classes: int
    width: int = WIDTH
    head_width: int = 512
    side: int = SIDE


@dataclass(frozen=True, kw_only=True)
class StepShape(Shape):
    """One training step of either stage: forward, loss, backward, AdamW."""

    family: Literal["scalemae", "satmae++", "dinov3"]
    batch: int
    sensor: str
    embed_dim: int = WIDTH
    depth: int = 24
    num_heads: int = 16
    blocks: tuple[int, ...] = (5, 11, 17, 23)
    image_size: int = 224
    modes: tuple[str, ...] = (STEP,)

    @property
    def stage(self) -> str:
        """ "stage1" or "stage2", as the name says."""
        return "stage1" if self.name.startswith("stage1-") else "stage2"

    @property
    def bands(self) -> int:
        return len(WAVELENGTHS[self.sensor])

    @property
    def classes(self) -> int:
        return CLASSES[self.sensor]


def _fc(side: str, name: str, tokens: int, *, experts: int = 4, small: bool = False,
        compiled: tuple[str, ...] = ()) -> AomoaShape:  # fmt: skip
    sizes = (WIDTH, MLP_WIDTH) if side == "fc1" else (MLP_WIDTH, WIDTH)
    return AomoaShape(
        name=f"{side}-{name}", tokens=tokens, in_features=sizes[0], out_features=sizes[1],
        experts=experts, small=small, compiled=compiled,
    )  # fmt: skip


_WITH_CLASS = TOKENS + 1
_VISIBLE = TOKENS // 4 + 1

AOMOA: tuple[AomoaShape, ...] = (
    _fc("fc1", "vitl-b2", 2 * _WITH_CLASS, small=True, compiled=(FORWARD,)),
    _fc("fc2", "vitl-b2", 2 * _WITH_CLASS, small=True, compiled=(FORWARD,)),
    *(_fc(side, "vitl-b1", _WITH_CLASS) for side in ("fc1", "fc2")),
    *(_fc(side, "vitl-b8", 8 * _WITH_CLASS) for side in ("fc1", "fc2")),
    *(_fc(side, "vitl-b32", 32 * _WITH_CLASS) for side in ("fc1", "fc2")),
    *(_fc(side, "stage1-b32", 32 * _VISIBLE) for side in ("fc1", "fc2")),
    # Where grouping tokens by expert overtakes computing every expert densely.
    *(_fc("fc2", f"vitl-b2-e{experts}", 2 * _WITH_CLASS, experts=experts) for experts in (8, 16)),
)

HYPERT: tuple[HypertShape, ...] = (
    HypertShape(name="whu-32-b1", batch=1, sensor="whu", small=True, compiled=(FORWARD,)),
    HypertShape(name="dfc-13-b1", batch=1, sensor="dfc"),
    HypertShape(name="landsat-6-b1", batch=1, sensor="landsat"),
    HypertShape(name="mts-24-b1", batch=1, sensor="mts"),
    HypertShape(name="even-128-b1", batch=1, sensor="even128"),
    HypertShape(name="enmap-224-b1", batch=1, sensor="enmap"),
    HypertShape(name="whu-32-b1-all", batch=1, sensor="whu", trainable="all", modes=(TRAINING,)),
    HypertShape(name="whu-32-b8", batch=8, sensor="whu"),
    HypertShape(name="dfc-13-b32", batch=32, sensor="dfc"),
)

MATCH: tuple[MatchShape, ...] = tuple(
    MatchShape(
        name=f"{kind}-b{batch}", batch=batch, queries=TOKENS, keys=keys, width=width,
        small=batch == 2, modes=(FORWARD,), compiled=(FORWARD,) if kind == "spatial" else (),
    )
    for batch in (2, 32)
    for kind, keys, width in (("spatial", STEM_SIDE**2, 256), ("spectral", STEM_WIDTH, 392))
)  # fmt: skip

RECONSTRUCTION: tuple[ReconstructionShape, ...] = tuple(
    ReconstructionShape(
        name=f"{family}-{bands}-b{batch}", family=family, batch=batch, bands=bands,
        small=batch == 2 and bands == 13,
        compiled=(FORWARD,) if family == "satmae++" else (),
    )
    for batch in (2, 16)
    for bands in (13, 32)
    for family in ("satmae++", "scalemae")
)  # fmt: skip

HEADS: tuple[HeadShape, ...] = tuple(
    HeadShape(
        name=f"{family}-{sensor}-b{batch}", family=family, batch=batch, sensor=sensor,
        small=batch == 1 and sensor == "dfc", compiled=(FORWARD,) if family == "scalemae" else (),
    )
    for batch in (1, 8)
    for sensor in ("dfc", "whu")
    for family in ("satmae++", "scalemae")
)  # fmt: skip

UPSAMPLE_CONV: tuple[UpsampleConvShape, ...] = tuple(
    UpsampleConvShape(
        name=f"{name}-b{batch}", batch=batch, in_channels=channels[0], out_channels=channels[1],
        low=low, high=high, small=batch == 1 and name != "neck-14-28",
        compiled=(FORWARD,) if name == "fuse-7-56" else (),
    )
    for batch in (1, 8, 32)
    for name, channels, low, high in (
        ("neck-14-56", (1024, 1024), 14, 56),
        ("neck-14-28", (1024, 1024), 14, 28),
        ("fuse-7-56", (512, 512), 7, 56),
    )
)  # fmt: skip

UPSAMPLE_CE: tuple[UpsampleCeShape, ...] = tuple(
    UpsampleCeShape(
        name=f"{sensor}-{CLASSES[sensor]}-b{batch}", batch=batch, classes=CLASSES[sensor],
        small=batch == 2, compiled=(FORWARD, TRAINING) if sensor == "whu" else (),
    )
    for batch in (2, 32)
    for sensor in ("whu", "dfc")
)  # fmt: skip

DECODER: tuple[DecoderShape, ...] = (
    # Batch statistics of the head's 1x1 pooled map need two images.
    DecoderShape(
        name="vitl-b1", batch=1, classes=9, small=True, modes=(FORWARD,), compiled=(FORWARD,)
    ),
    DecoderShape(name="vitl-b2", batch=2, classes=9, small=True, modes=(TRAINING,)),
    DecoderShape(name="vitl-b8", batch=8, classes=9),
)

STEPS: tuple[StepShape, ...] = (
    StepShape(name="scalemae-vitl-dfc-b2", family="scalemae", batch=2, sensor="dfc", small=True),
    StepShape(name="satmae++-vitl-whu-b2", family="satmae++", batch=2, sensor="whu"),
    *(
        StepShape(name=f"scalemae-vitl-dfc-b{batch}", family="scalemae", batch=batch, sensor="dfc")
        for batch in (32, 8, 1)  # where time runs out, the first are measured
    ),
)

RECONSTRUCTION_STEPS: tuple[StepShape, ...] = (
    *(
        StepShape(
            name=f"stage1-{family}-vitl-{sensor}-b{batch}", family=family, batch=batch,
            sensor=sensor, small=family == "scalemae" and batch == 2,
        )
        for batch, sensor in ((2, "dfc"), (8, "dfc"))
        for family in ("scalemae", "satmae++")
    ),
    *(
        StepShape(
            name=f"stage1-scalemae-vitl-dfc-b{batch}", family="scalemae", batch=batch, sensor="dfc",
        )
        for batch in (1, 32)
    ),
)  # fmt: skip

SHAPES: dict[str, tuple[Shape, ...]] = {
    "aomoa": AOMOA,
    "hypert": HYPERT,
    "match": MATCH,
    "reconstruction": RECONSTRUCTION,
    "heads": HEADS,
    "upsample_conv": UPSAMPLE_CONV,
    "upsample_ce": UPSAMPLE_CE,
    "decoder": DECODER,
    "step": STEPS + RECONSTRUCTION_STEPS,
}
# Only layers with experts have a per-expert algorithm to stand against.
WITH_DISPATCH = ("aomoa", "step")


def implementations(op: str, shape: Shape, mode: str, *, full: bool) -> tuple[str, ...]:
    """The rows of a group: which of `IMPLEMENTATIONS` it has."""
    left_out = set()
    if op not in WITH_DISPATCH:
        left_out.add("dispatch")
    if not full and mode not in shape.compiled:
        left_out.add("compile")
    return tuple(name for name in IMPLEMENTATIONS if name not in left_out)


def selected(op: str, *, full: bool) -> tuple[Shape, ...]:
    """The shapes of `op` in the default run, or in ``--full``."""
    return tuple(shape for shape in SHAPES[op] if (shape.full if full else shape.small))


ShapeType = TypeVar("ShapeType", bound=Shape)


def find(shapes: Sequence[ShapeType], name: str) -> ShapeType:
    """The shape called `name`.

    Raises
    ------
    ValueError : there is none of this name.
    """
    for shape in shapes:
        if shape.name == name:
            return shape
    raise ValueError(f"shape: got {name!r}, expected one of {', '.join(s.name for s in shapes)}")
