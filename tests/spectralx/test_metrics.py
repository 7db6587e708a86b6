from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from spectralx.metrics import Scores, SegmentationScores, score_table

NAMES = ("unlabelled", "soil", "water", "tree")


def scored(prediction: list[int], target: list[int], **options: object) -> Scores:
    metric = SegmentationScores(NAMES, **options)  # type: ignore[arg-type]
    metric.update(torch.tensor(prediction), torch.tensor(target))
    return metric.compute()


def test_figures_worked_by_hand() -> None:
    # Truth: 4 soil, 2 water, 2 unlabelled. One soil pixel is called water.
    scores = scored([1, 1, 1, 2, 2, 2, 1, 3], [1, 1, 1, 1, 2, 2, 0, 0])
    assert scores.pixels == 6
    torch.testing.assert_close(scores.iou[1:3], torch.tensor([3 / 4, 2 / 3]).double())
    assert scores.iou[0].isnan()
    assert scores.iou[3].isnan()
    assert scores.miou == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert scores.overall_accuracy == pytest.approx(5 / 6)
    assert scores.mean_f1 == pytest.approx((6 / 7 + 4 / 5) / 2)
    chance = (4 * 3 + 2 * 3) / 36
    assert scores.kappa == pytest.approx((5 / 6 - chance) / (1 - chance))
    assert scores.recall[1] == pytest.approx(3 / 4)
    assert scores.precision[2] == pytest.approx(2 / 3)


def test_a_class_only_predicted_counts_as_zero_and_officially_not_at_all() -> None:
    prediction, target = [1, 1, 3, 0], [1, 1, 1, 1]
    proper = scored(prediction, target)
    assert proper.miou == pytest.approx((2 / 4 + 0) / 2)
    assert proper.overall_accuracy == pytest.approx(0.5)
    official = scored(prediction, target, protocol="official")
    assert official.miou == pytest.approx(2 / 3)


def test_batches_add_up_and_reset_clears() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randint(0, 4, (2, 6, 5, 5), generator=generator)
    whole, parts = SegmentationScores(NAMES), SegmentationScores(NAMES)
    whole.update(prediction, target)
    for index in range(6):
        parts.update(prediction[index], target[index])
    assert torch.equal(whole.compute().matrix, parts.compute().matrix)
    assert int(whole.compute().matrix[0].sum()) == 0
    parts.reset()
    assert parts.compute().pixels == 0
    assert math.isnan(parts.compute().miou)


def test_no_ignored_class() -> None:
    scores = scored([0, 1], [0, 0], ignore_index=None)
    assert scores.pixels == 2
    assert scores.iou[0] == pytest.approx(0.5)


def test_majority_answers_one_class() -> None:
    scores = scored([1, 2, 2, 3], [1, 1, 1, 3])
    assert scores.majority_miou() == pytest.approx((3 / 4 + 0) / 2)
    assert scores.majority_miou(3) == pytest.approx((1 / 4 + 0) / 2)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([1], [1, 2], r"target: got shape \[2\], expected \[1\]"),
        ([1], [4], "target: got label 4, expected 0 to 3"),
        ([7], [1], "prediction: got class 7, expected 0 to 3"),
    ],
)
def test_wrong_input_is_refused(prediction: list[int], target: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored(prediction, target)


def test_table_lists_classes_and_overall_figures() -> None:
    scores = scored([1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2])
    table = score_table({"source": scores, "target": scored([1], [2])})
    lines = {line.split("  ")[0]: line.split()[-2:] for line in table.splitlines()}
    assert lines["IoU soil"] == ["75.0", "0.0"]
    assert lines["IoU tree"] == ["-", "-"]
    assert lines["mIoU"] == ["70.8", "0.0"]
    assert "unlabelled" not in table


def _count_own_share(rank: int, world: int, folder: str) -> None:
    """One process: every `world`-th image from `rank` on, then the scores of all."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    try:
        prediction, target = _images()
        metric = SegmentationScores(NAMES, sync_on_compute=True)
        for epoch in range(2):  # reset clears what was gathered, too
            metric.reset()
            for index in range(rank, len(target), world):
                metric.update(prediction[index], target[index])
            found = metric.compute()
            torch.save(found.matrix, f"{folder}/{epoch}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randint(0, 4, (2, 5, 6, 7), generator=generator)
    return prediction, target


def test_two_processes_score_what_one_would(tmp_path: Path) -> None:
    """Shares of different sizes, over gloo."""
    torch.multiprocessing.spawn(_count_own_share, (2, str(tmp_path)), nprocs=2)
    whole = SegmentationScores(NAMES)
    whole.update(*_images())
    for epoch in range(2):
        for rank in range(2):
            found = torch.load(tmp_path / f"{epoch}-{rank}.pt")
            assert torch.equal(found, whole.compute().matrix)
