"""`benchmarks.step_parts`: every part is seen there and back, and nothing is charged twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from benchmarks import step_parts
from benchmarks.case import Setting
from benchmarks.memory import SavedBytes, peaks_by_label
from benchmarks.shapes import StepShape
from benchmarks.stages import STAGES
from benchmarks.step_parts import Found, measure, table
from benchmarks.watch import BACKWARD, Watch

SHAPE = StepShape(
    name="tiny", family="scalemae", batch=2, sensor="dfc", embed_dim=64, depth=2, num_heads=4,
    blocks=(0, 1), image_size=128,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "family", "size", "widest"),
    [
        ("stage2", "scalemae", 128, "decoder"),
        ("stage1", "scalemae", 64, "head"),
        ("stage1", "satmae++", 64, "head"),
    ],
)
def test_a_step_is_the_sum_of_its_parts(
    name: str, family: Literal["scalemae", "satmae++"], size: int, widest: str,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    stage = STAGES[name]
    before, after = measure(stage, replace(SHAPE, family=family, image_size=size), Setting(), 1)
    for found in (before, after):
        (seconds,) = found.rounds
        ways = {*stage.parts, *(part + BACKWARD for part in stage.parts if part != "optimizer")}
        assert seconds.keys() == {*ways, ""}
        assert all(seconds[way] > 0 for way in ways)
        assert found.saved.keys() <= set(stage.parts)
        assert found.saved[widest] > found.saved["loss"]
        assert found.peaks.keys() == seconds.keys()
    assert after.saved[widest] < before.saved[widest]
    assert after.peaks["loss"] < before.peaks["loss"]
    rows = table(before, after, stage.parts)
    assert [row[0] for row in rows] == ["part", *stage.parts, "step"]
    assert len({len(row) for row in rows}) == 1
    monkeypatch.setattr(step_parts, "measure", lambda *_: (before, after))
    assert step_parts.main([name, "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*-step-*-float32.md")
    assert f"| {widest} |" in page.read_text()


def test_a_shape_of_the_other_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_parts.main(["stage1", "--shape", STAGES["stage2"].shapes[0].name]) == 2
    assert "expected one of stage1-scalemae" in capsys.readouterr().err


def test_a_step_that_disagrees_gets_no_numbers() -> None:
    def wrong(model: nn.Module) -> Any:
        plain = plain_of(model)
        plain.head.conv_seg.register_forward_hook(lambda *given: 1.1 * given[2])
        return plain

    stage = STAGES["stage2"]
    plain_of = stage.plain
    with pytest.raises(AssertionError, match="gradient of head"):
        measure(replace(stage, plain=wrong), SHAPE, Setting(), 1)


def test_a_crossing_charges_both_ways() -> None:
    watch = Watch("cpu")
    x, constant = torch.ones(3, requires_grad=True), torch.ones(3)
    watch.start()
    watch.enter("first")
    y, same = watch.crossing((2 * x, constant), "first", "second")
    assert watch.part == "second"
    assert same is constant
    watch.enter("second" + BACKWARD)
    (y * same).sum().backward()
    assert watch.part == "first" + BACKWARD
    assert torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_medians_and_peaks() -> None:
    rounds = [{"loss": 1e-3, "": 0.0}, {"loss": 3e-3, "": 1e-3}, {"loss": 2e-3, "": 9e-3}]
    found = Found(rounds, peaks={"loss": 2**20, "loss" + BACKWARD: 2**21})
    assert found.ms("loss") == pytest.approx(2)
    assert found.ms("decoder") == 0
    assert found.total() == pytest.approx(4)
    assert found.peak("loss") == 2


def test_memory_by_label() -> None:
    def run() -> None:
        small = torch.empty(2**18)
        with torch.profiler.record_function("part: one"):
            pass
        large = torch.empty(2**20)
        del large
        with torch.profiler.record_function("part: two"):
            pass
        del small

    peaks = peaks_by_label(run, "part: ")
    assert peaks[""] == peaks["two"] == 2**20
    assert peaks["one"] == 5 * 2**20
    label = "a"
    x = torch.ones(4, requires_grad=True)
    with SavedBytes([x], lambda: label) as saved:
        y = x.exp()
        label = "b"
        (y.exp() * y).sum()
    assert saved.by_label == {"a": 16, "b": 16}
