"""The measure of growth in `benchmarks.scaling`: lines, work, and what is kept between runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks.case import Case, Setting
from benchmarks.scaling import Growth, RankedShape, disagreements, shapes, work_of, write
from benchmarks.shapes import FORWARD, TRAINING

FACTS = {"device": "A CPU", "device_type": "cpu", "threads": 2, "torch": "2", "commit": "abc"}


def growth(medians: list[float], work: list[int] | None = None, name: str = "g") -> Growth:
    sizes = [1, 2, 4, 8]
    return Growth(name, "tokens", sizes, medians, work or sizes, FACTS)


def test_a_line_with_a_fixed_part_is_linear() -> None:
    found = growth([3.0, 5.0, 9.0, 17.0])  # 1 + 2 n
    assert found.line() == pytest.approx((1.0, 2.0))
    assert found.deviations() == pytest.approx([0.0] * 4, abs=1e-12)
    assert found.over_work()[0] == 1
    assert max(found.over_work()) == 1
    assert found.over_work()[-1] == pytest.approx(17 / 3 / 8)


def test_faster_growth_than_the_work_shows() -> None:
    found = growth([1.0, 4.0, 16.0, 64.0])
    assert max(found.over_work()) == 8
    assert max(found.deviations()) > 0.2
    assert "time/work at most 8.00" in found.summary()
    assert found.table()[-1][:4] == ["8", "64", "8", "64"]


@pytest.mark.parametrize("layer", scaling.LAYERS)
def test_work_counts_what_varies(layer: str) -> None:
    sizes, made = shapes(layer, "tokens", full=True)
    assert sizes == [197 * images for images in (1, 2, 4, 8, 16, 32, 64)]
    work = [work_of(shape, FORWARD) for shape in made]
    assert [value / work[0] for value in work] == [1, 2, 4, 8, 16, 32, 64]
    assert work_of(made[0], TRAINING) > 2 * work[0]
    base = made[0]
    a, r, d = base.attributes, base.rank, base.in_features // base.attributes
    by_hand = base.in_features * base.out_features + r * (a * d + base.out_features)
    by_hand += a * r * (base.experts + 2 * base.top_k * base.hidden)
    assert work[0] == pytest.approx(base.tokens * by_hand, rel=1e-3)  # experts' rows are whole
    sizes, ranked = shapes(layer, "rank", full=False)
    assert [shape.rank for shape in ranked] == sizes == [d // 16, d // 8, d // 4, d // 2, d]
    assert len({shape.hidden for shape in ranked}) == 1
    _, experts = shapes(layer, "experts", full=False)
    assert work_of(experts[-1], FORWARD) < 1.1 * work_of(experts[0], FORWARD)


def test_a_layer_that_disagrees_gets_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = RankedShape(name="s", tokens=9, in_features=128, out_features=16, own_rank=6)
    setting = Setting(rotate=False)
    assert not disagreements(shape, TRAINING, setting)

    def wrong(shape: RankedShape, mode: str, setting: Setting) -> Case:
        case = build(shape, mode, setting)
        eager = case.functions["eager"]
        return replace(case, functions={**case.functions, "fused": lambda *x: 1.001 * eager(*x)})

    build = scaling.build
    monkeypatch.setattr(scaling, "build", wrong)
    assert disagreements(shape, TRAINING, setting)
    monkeypatch.setattr(scaling, "shapes", lambda *_: ([32], [shape]))
    with pytest.raises(AssertionError, match="aomoa/fc1/fwd/float32/rank at 32: output 0"):
        scaling.grow("fc1", "rank", FORWARD, Setting(dtype=torch.float32), full=False, seconds=0)


def test_groups_not_measured_now_are_kept(tmp_path: Path) -> None:
    write([growth([1.0, 2, 3, 4], name="a"), growth([1.0, 2, 3, 4], name="b")], tmp_path)
    path = write([growth([5.0, 6, 7, 8], name="b")], tmp_path)
    kept = {entry["group"]: entry["medians"][0] for entry in json.loads(path.read_text())}
    assert kept == {"a": 1.0, "b": 5.0}
    page = path.with_suffix(".md").read_text()
    assert page.index("## a") < page.index("## b")
    assert "commit abc" in page
