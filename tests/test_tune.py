"""`benchmarks.tune` and the steps it looks at, as far as a CPU can show them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_step, ceilings, report, tune, tuning
from benchmarks.calls import Call, of_step
from benchmarks.case import Setting
from benchmarks.harness import Budget, measure
from benchmarks.shapes import FORWARD, STEP, TRAINING, StepShape
from benchmarks.tuning import GRAPHS, HOSTED, Row
from spectralx_kernels.aomoa.ops import AOMOA
from spectralx_kernels.linear.ops import LINEAR

STEP_SHAPE = StepShape(
    name="stage1-tiny", family="scalemae", batch=1, sensor="dfc", embed_dim=64, depth=4,
    num_heads=4, blocks=(0, 1, 2, 3), image_size=64,
)  # fmt: skip
FACTS = {"device": "A GPU", "device_type": "cuda", "commit": "abc",
         "ceilings": {"copy": 3e12, "bfloat16": 8e14}}  # fmt: skip


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Of a step of stage 1 in bfloat16."""
    return of_step(STEP_SHAPE, Setting(dtype=torch.bfloat16))


def row(graphs: dict[str, float], hosted: dict[str, float], **values: Any) -> Row:
    times = {GRAPHS: graphs, HOSTED: hosted}
    return Row("op", "op 3x4", 8, FORWARD, "bfloat16", "cuda", "ops.py:1 _prefer", times, **values)


def test_a_default_is_flagged_where_another_backend_or_compile_is_faster() -> None:
    fine = row({"cuda": 1.0, "triton": 0.99}, {"cuda": 1.0, "triton": 1.5, "compile": 1.0})
    assert fine.flags() == []
    slow = row({"cuda": 1.5, "triton": 1.0, "compile": 2.0}, {"cuda": 2.0, "compile": 1.0})
    assert slow.flags() == ["graphs: triton 1.50x as fast", "hosted: slower than compile, 2.00x"]
    assert slow.fastest(HOSTED) == "cuda"  # compile is no backend
    wrong = row({"eager": 1.0}, {"eager": 1.0}, refused={"cuda": "error 1"})
    assert wrong.flags() == ["default cuda has no number"]


def test_the_page_says_what_to_change_and_where(tmp_path: Path) -> None:
    slow = row({"cuda": 1.5, "triton": 1.0}, {"cuda": 2.0, "triton": 3.0}, copy=0.5)
    large = replace(slow, call="op 9x9", milliseconds={GRAPHS: {"cuda": 9.0, "triton": 2.0},
                                                       HOSTED: {"cuda": 9.0}})  # fmt: skip
    path = tuning.write(tmp_path, "a-gpu", [slow, large], FACTS)
    text = path.with_suffix(".md").read_text()
    assert "| op | bfloat16 | 8 | fwd | op 3x4 | cuda | graphs: triton 1.50x as fast | ops" in text
    assert "| op | bfloat16 | 8 | fwd | cuda | triton | cuda | ops.py:1 _prefer |" in text
    assert "copy 3.00 TB/s (read and written), bfloat16 800.0 TFLOP/s" in text
    assert "| op 3x4 | 8 | fwd | bfloat16 | cuda | 1.500 | 1.000 | 2.000 | 3.000 | 0.500 |" in text
    # Another call of the same commit adds to it; one of another commit begins anew.
    other = replace(slow, dtype="float32")
    tuning.write(tmp_path, "a-gpu", [other, replace(slow, copy=1.0)], FACTS)
    kept = [Row(**each) for each in json.loads(path.read_text())["rows"]]
    assert {each.key for each in kept} == {slow.key, large.key, other.key}
    assert {each.copy for each in kept if each.key == slow.key} == {1.0}
    tuning.write(tmp_path, "a-gpu", [other], {**FACTS, "commit": "other"})
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_a_place_is_the_function_that_decides() -> None:
    assert tuning.place_of(AOMOA.decider()).startswith("spectralx_kernels/aomoa/ops.py:")
    assert tuning.place_of(LINEAR.decider()).endswith(" _prefer")


def test_calls_of_a_step_and_a_run_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        calls = of_step(STEP_SHAPE, Setting(dtype=dtype))
        names = {call.operator.name for call in calls}
        assert names >= {"aomoa", "residual_halving", "pixel_head", "random_masking", "linear"}
        (layer,) = {call.tensors[0].dtype for call in calls if call.operator is AOMOA}
        assert layer == dtype  # as autocast gives it to the kernels
    wanted = {"gather_tokens": (FORWARD, TRAINING), "random_masking": (FORWARD,)}

    def few(shape: StepShape, setting: Setting, most: int) -> list[Call]:
        return [call for call in calls if call.operator.name in wanted]

    monkeypatch.setattr(tune, "chosen", few)
    monkeypatch.setattr(ceilings, "measure", lambda device: FACTS["ceilings"])
    given = ["--device", "cpu", "--plan", "float32:1", "--without", "compile"]
    assert tune.main([*given, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-tune.json")
    rows = [Row(**each) for each in json.loads(path.read_text())["rows"]]
    assert {(each.operator, each.mode) for each in rows} == {
        (name, mode) for name, modes in wanted.items() for mode in modes
    }
    for each in rows:
        assert each.milliseconds[HOSTED].keys() == {"cpp", "eager"}
        assert not each.refused
        assert each.default == "cpp"
    assert tune.main([*given, "--out", str(tmp_path / "late"), "--seconds", "0"]) == 1


def test_a_wrong_backend_gets_no_time(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    (call,) = [call for call in calls if call.operator.name == "gather_tokens"]
    setting = Setting(rotate=False)
    plain = type(call.operator).__call__

    def spoiled(self: Any, *args: Any, backend: str | None = None) -> Any:
        return plain(self, *args, backend=backend) * 1.5

    monkeypatch.setattr(type(call.operator), "__call__", spoiled)
    found = tune.row_of(call, FORWARD, setting, 1)
    tune.measure(found, call, setting, 1e12, ["cpp", "eager"])
    assert found.refused.keys() == {"cpp"}
    assert found.milliseconds[HOSTED].keys() == {"eager"}


def test_a_step_of_one_image_agrees_with_the_reference() -> None:
    shape = replace(STEP_SHAPE, name="stage2-tiny", image_size=32)
    rows = measure(
        bench_step.build, shape, STEP, Setting(), ("fused", "eager"), Budget(0.0, (1, 1))
    )
    assert not any(each.refused for each in rows.values()), rows
    # The same model, as it was drawn, for any batch.
    model = bench_step.drawn_model(shape, "cpu")
    assert model is bench_step.drawn_model(replace(shape, batch=3), "cpu")
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(1.0)
    again = bench_step.drawn_model(shape, "cpu")
    assert not again.head.training
    assert all(torch.equal(value, before[name]) for name, value in again.named_parameters())


def test_ceilings_and_the_roof() -> None:
    found = ceilings.measure("cpu", copied=2**16, side=32)
    assert found.keys() == {ceilings.COPY, "bfloat16", "float16", "float32"}
    assert all(rate > 0 for rate in found.values())
    given = {ceilings.COPY: 100.0, "bfloat16": 1000.0}
    assert ceilings.seconds(given, 5000, 100, "bfloat16") == 5.0
    assert ceilings.seconds(given, 0, 300, "float64") == 3.0
    with pytest.raises(KeyError):
        ceilings.seconds(given, 1, 0, "float64")
    facts = {"ceilings": given, "operations": 5000, "nbytes": 100}
    group = report.Group("op/x/fwd/bfloat16", {"fused": 1e4}, {"floor": facts})
    assert (group.roof(), group.over_roof()) == (5000.0, 2.0)
    assert report.Group("op/x/fwd/float64", {}, {"floor": facts}).roof() is None
    assert report.Group("op/x/fwd/bfloat16", {"fused": 1.0}, {"floor": {}}).over_roof() is None
