"""confusion_matrix_update: every pixel counted once, in the right cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralx_kernels import _backends
from spectralx_kernels.upsample import confusion_matrix_update
from spectralx_kernels.upsample.confusion import CONFUSION_MATRIX_UPDATE
from tests.kernels import ladder

BACKENDS = _backends.available(CONFUSION_MATRIX_UPDATE.name, "cpu")


def labels(classes: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, shape, generator=generator)


def test_ladder() -> None:
    args = (torch.ones(5, 5).long(), labels(5, 2, 4, 3), labels(5, 2, 4, 3, seed=1), 0)
    ladder.check_contract(CONFUSION_MATRIX_UPDATE, args)
    ladder.check_accuracy(CONFUSION_MATRIX_UPDATE, args, torch.float32)
    ladder.check_repeats(CONFUSION_MATRIX_UPDATE, args)


def test_compiles() -> None:
    ladder.check_compiles(
        lambda confusion, prediction, target: confusion_matrix_update(
            confusion, prediction, target, 0
        ),
        (torch.ones(5, 5).long(), labels(5, 2, 4, 3), labels(5, 2, 4, 3, seed=1)),
        compiler="aot_eager",
    )


@given(
    classes=st.integers(1, 7),
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    ignore_index=st.sampled_from([-100, 0, 255]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_counts_every_pixel_once(classes: int, shape: list[int], ignore_index: int) -> None:
    prediction, target = labels(classes, *shape), labels(classes, *shape, seed=1)
    target[labels(4, *shape, seed=2) == 0] = ignore_index if ignore_index >= 0 else 0
    start = labels(9, classes, classes, seed=3)
    before = start.clone()
    expected = start.clone()
    for true, predicted in zip(
        target.flatten().tolist(), prediction.flatten().tolist(), strict=True
    ):
        if true != ignore_index:
            expected[true, predicted] += 1
    found = confusion_matrix_update(start, prediction, target, ignore_index)
    assert torch.equal(found, expected)
    assert torch.equal(start, before)


def test_prediction_of_an_ignored_pixel_is_never_looked_at(backend: str) -> None:
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    prediction, target = torch.tensor([7, 1]), torch.tensor([255, 0])
    found = confusion_matrix_update(confusion, prediction, target, 255, backend=backend)
    assert found.tolist() == [[0, 1], [0, 0]]


def test_small_integer_dtypes_do_not_overflow(backend: str) -> None:
    confusion = torch.zeros(200, 200, dtype=torch.int64)
    pixel = torch.full((3,), 199, dtype=torch.uint8)
    assert confusion_matrix_update(confusion, pixel, pixel, backend=backend)[199, 199] == 3


def test_a_wrong_label_nobody_looked_at_is_not_counted() -> None:
    """Where the values cannot be looked at, as on a GPU."""
    confusion = torch.zeros(2, 2, dtype=torch.int64)
    wrong, right = torch.tensor([0, 2, -1, 1]), torch.tensor([0, 0, 1, 1])
    reference = CONFUSION_MATRIX_UPDATE.reference
    assert reference(confusion, wrong, right, -100).tolist() == [[1, 0], [0, 1]]
    assert reference(confusion, right, wrong, -100).tolist() == [[1, 0], [0, 1]]


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no C++ kernel was built")
def test_the_kernel_itself_refuses_what_is_no_class() -> None:
    confusion, right = torch.zeros(3, 3).long(), torch.zeros(4).long()
    wrong = torch.tensor([0, 7, -2, 1])
    with pytest.raises(ValueError, match="prediction: got class -2, expected 0 to 2"):
        CONFUSION_MATRIX_UPDATE(confusion, wrong, right, -100)
    with pytest.raises(ValueError, match="target: got label -2, expected 0 to 2 or ignore_index"):
        CONFUSION_MATRIX_UPDATE(confusion, right, wrong, -100)
    assert not confusion.any()


@pytest.mark.parametrize("classes", [2, 300])
def test_more_pixels_than_a_block_on_any_number_of_threads(classes: int, backend: str) -> None:
    shape = (3, 173, 251)
    prediction, target = labels(classes, *shape).int(), labels(classes, *shape, seed=1).short()
    expected = torch.bincount(
        (target.long() * classes + prediction).flatten(), minlength=classes**2
    ).view(classes, classes)
    expected[1] = 0
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        found = confusion_matrix_update(
            torch.zeros_like(expected), prediction, target, 1, backend=backend
        )
        assert torch.equal(found, expected)
        strided = confusion_matrix_update(
            torch.zeros_like(expected), prediction.mT, target.mT, 1, backend=backend
        )
        assert torch.equal(strided, expected)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confusion": torch.zeros(3, 3)}, "confusion: got dtype torch.float32, expected torch.i"),
        ({"confusion": torch.zeros(3, 4).long()}, r"confusion: got shape \[3, 4\], expected \[3"),
        ({"prediction": torch.zeros(2, 5)}, "prediction: got dtype torch.float32"),
        ({"prediction": torch.full((2, 5), 3)}, "prediction: got class 3, expected 0 to 2"),
        ({"prediction": torch.full((2, 5), -1)}, "prediction: got class -1, expected 0 to 2"),
        ({"target": torch.zeros(2, 4).long()}, r"target: got shape \[2, 4\], expected \[2, 5\]"),
        ({"target": torch.full((2, 5), 3)}, "target: got label 3, expected 0 to 2 or ignore_in"),
    ],
)
def test_bad_counts_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "confusion": torch.zeros(3, 3).long(),
        "prediction": torch.zeros(2, 5).long(),
    }
    good["target"] = torch.zeros(2, 5).long()
    with pytest.raises((TypeError, ValueError), match=message):
        confusion_matrix_update(**{**good, **change})
