from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectralx.evaluate import Evaluation
from spectralx.fit import FitResult
from spectralx.metrics import Scores
from spectralx.quickstart import check_stage1, check_stage2, main, scenes_for
from tests.spectralx.tiny import tiny_config, tiny_settings


def result(
    before: float = 1.0, after: float = 1.0, matrix: list[list[int]] | None = None
) -> FitResult:
    """A stage that went from masked loss `before` to `after`, or reached `matrix` on the source."""
    evaluation = None
    if matrix is not None:
        scores = Scores(torch.tensor(matrix), ["unlabelled", "a", "b"])
        evaluation = Evaluation({"source": scores.summary()}, {"source": scores})
    path = Path("unused")
    return FitResult(path, path, path, {"masked_loss": before}, {"masked_loss": after}, evaluation)


@pytest.mark.parametrize(("after", "passed"), [(0.49, True), (0.5, True), (0.51, False)])
def test_stage1_halves_its_loss(after: float, passed: bool) -> None:
    check = check_stage1(result(1.0, after))
    assert check.passed is passed
    assert f"{after:.4f}" in str(check)
    assert str(check).startswith("ok" if passed else "FAILED")


def test_stage2_beats_the_constant_answer_by_30_points() -> None:
    # Always "a": IoU 60/100 and 0, mean 30 %.
    good = check_stage2(result(matrix=[[0, 0, 0], [0, 55, 5], [0, 10, 30]]))
    assert good.passed
    assert "always the commonest class 30.0 %" in good.text
    poor = check_stage2(result(matrix=[[0, 0, 0], [0, 45, 15], [0, 10, 30]]))
    assert not poor.passed  # mIoU 59.4 %: 29.4 points


def test_scenes_are_made_once(tiny_scenes: Path, tmp_path: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_scenes.rglob("*.tif")}
    assert scenes_for(tiny_settings(tiny_scenes, tmp_path)) == tiny_scenes
    assert before == {path: path.stat().st_mtime_ns for path in tiny_scenes.rglob("*.tif")}
    assert "there already" in capsys.readouterr().out


def test_a_run_that_learns_too_little_says_so(
    tiny_scenes: Path, tmp_path: Path, capsys: Any
) -> None:
    options = [f"--data.root={tiny_scenes}", f"--out={tmp_path / 'run'}"]
    options += ["--stage1.run.pictures=0", "--stage2.run.pictures=0", "--stage1.run.steps=1"]
    status = main(["--config", str(tiny_config(tmp_path)), *options])
    printed = capsys.readouterr().out
    assert status == 1
    assert "FAILED: stage 1: masked loss" in printed
    assert "FAILED: stage 2: mIoU on the source test" in printed
    assert "mIoU" in printed
    assert (tmp_path / "run" / "stage2" / "best" / "manifest.json").is_file()
