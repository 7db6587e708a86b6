"""Whole training steps of both stages on a GPU: right, and without waiting for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import bench_step
from benchmarks.case import Setting
from benchmarks.harness import Budget, measure
from benchmarks.shapes import STEP, StepShape
from tests.gpu.watching import no_synchronisation

DTYPES = (torch.float32, torch.bfloat16)
STAGE1 = StepShape(
    name="stage1-scalemae", family="scalemae", batch=2, sensor="dfc", embed_dim=64, depth=4,
    num_heads=4, blocks=(0, 1, 2, 3), image_size=64,
)  # fmt: skip
SHAPES = {
    shape.name: shape
    for shape in (
        STAGE1,
        replace(STAGE1, name="stage1-satmae++", family="satmae++"),
        # Larger: batch norms over a handful of values magnify round-off.
        replace(STAGE1, name="stage2", image_size=128),
        replace(STAGE1, name="stage2-one", batch=1),
    )
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_has_the_references_gradients(name: str, dtype: torch.dtype) -> None:
    rows = measure(
        bench_step.build, SHAPES[name], STEP, Setting("cuda", dtype), ("fused", "eager"),
        Budget(0.0, (1, 1)),
    )  # fmt: skip
    assert not any(row.refused for row in rows.values()), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_does_not_wait_for_the_gpu(name: str, dtype: torch.dtype) -> None:
    case = bench_step.build(SHAPES[name], STEP, Setting("cuda", dtype, rotate=False))
    assert case.finish is not None
    for _ in range(3):
        case.functions["fused"](*case.inputs[0])
        case.finish()
    with no_synchronisation():
        loss = case.functions["fused"](*case.inputs[0])
        case.finish()
    assert loss.isfinite()
