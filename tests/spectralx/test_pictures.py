from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imread

from spectralx import pictures

SENTINEL = [0.443, 0.490, 0.560, 0.665, 0.705, 0.740, 0.783, 0.833, 0.865]


def test_composite_is_chosen_by_wavelength_not_by_position() -> None:
    assert pictures.composite_bands(SENTINEL) == (8, 3, 2)
    assert pictures.composite_bands(SENTINEL[::-1]) == (0, 5, 6)
    assert pictures.composite_bands(SENTINEL, pictures.NATURAL) == (3, 2, 1)
    # Nothing near the visible: spread over what there is, longest first.
    assert pictures.composite_bands([2.1, 2.2, 2.3]) == (2, 1, 0)
    assert pictures.composite_bands([1.0]) == (0, 0, 0)


def test_reconstruction_greys_what_is_masked(tmp_path: Path) -> None:
    images = torch.rand(2, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 16, 16)
    masks[:, :8] = 1
    path = tmp_path / "new" / "picture.png"
    pictures.reconstruction(path, images, torch.zeros_like(images), masks, SENTINEL)
    drawn = imread(path)[..., :3]
    grey = np.isclose(drawn, 0.5, atol=0.01).all(-1)
    # Half of two of the six panels; panels fill about two thirds of the figure.
    assert grey.mean() > 0.08
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_segmentation_colours_follow_the_classes(tmp_path: Path) -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, 4:] = 2
    path = tmp_path / "picture.png"
    names = ["unlabelled", "soil", "water"]
    pictures.segmentation(path, torch.rand(1, 9, 8, 8), list(labels), list(labels), names, SENTINEL)
    drawn = imread(path)[..., :3]

    def share(index: int) -> float:
        colour = np.asarray(pictures.class_colours(3)(index)[:3])
        return float(np.isclose(drawn, colour, atol=0.01).all(-1).mean())

    assert share(2) > 0.1
    assert share(1) == 0


def test_learning_curves_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text(
        "step,epoch,train/loss,val/loss,val/miou,lr\n"
        "0,0,,9.0,0.1,\n1,0,8.0,,,0.1\n2,0,,0.2,0.4,0.1\n"
    )
    curves = pictures.read_curves(log)
    assert curves["val/loss"] == ([0.0, 2.0], [9.0, 0.2])
    assert set(curves) == {"train/loss", "val/loss", "val/miou", "lr"}
    pictures.learning_curves(tmp_path / "curves.png", curves)
    height, width = imread(tmp_path / "curves.png").shape[:2]
    assert width > 2.5 * height


def test_confusion_shows_the_classes_that_occur(tmp_path: Path) -> None:
    names = ["unlabelled", *(f"class {index}" for index in range(1, 20))]
    matrix = torch.zeros(20, 20, dtype=torch.int64)
    matrix[0, 5] = 1000  # no truth: not shown
    matrix[3, 3], matrix[3, 7] = 90, 10

    def size(name: str, counts: torch.Tensor) -> tuple[int, int]:
        pictures.confusion(tmp_path / name, counts, names, "title")
        drawn = imread(tmp_path / name)
        return drawn.shape[0], drawn.shape[1]

    few = size("few.png", matrix)
    blue = imread(tmp_path / "few.png")[..., :3]
    dark = np.isclose(blue, pictures.colormaps["Blues"](0.9)[:3], atol=0.01).all(-1)
    assert dark.sum() > 200  # the cell of 90 %
    matrix.fill_diagonal_(5)
    many = size("many.png", matrix)
    assert many[0] > 1.5 * few[0]
    assert many[1] > 1.5 * few[1]
    assert size("none.png", torch.zeros(20, 20, dtype=torch.int64)) == few
