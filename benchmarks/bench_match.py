"""The Are-adapter's match: for each key the query that attends to it most. It has no gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import floors
from benchmarks.case import Case, Draw, Setting, Tensors, rotating
from benchmarks.shapes import MatchShape
from spectralx_kernels import match_argmax


def build(shape: MatchShape, mode: str, setting: Setting) -> Case:
    draw = Draw(setting, seed=0)

    def input_set() -> Tensors:
        queries = draw.normal(shape.batch, shape.queries, shape.width)
        return queries, draw.normal(shape.batch, shape.keys, shape.width)

    elements = shape.batch * (shape.queries + shape.keys) * shape.width
    return Case(
        functions={"fused": match_argmax, "eager": partial(match_argmax, backend="eager")},
        inputs=rotating(setting, input_set),
        floor=lambda: floors.floor_of(floors.match(shape), elements, setting),
    )


def test_match(report: Callable[..., None]) -> None:
    report(build)
