"""Sine-cosine position tables."""

from __future__ import annotations

import math

import pytest
import torch

from spectralx.backbones.positions import sincos_positions


def test_entries_are_sines_and_cosines_of_column_and_row() -> None:
    dim, rows, columns, resolution = 16, 3, 5, 10.0
    table = sincos_positions(dim, (rows, columns), resolution=resolution)
    assert table.shape == (rows * columns, dim)
    assert table.dtype == torch.float32
    for row, column in ((0, 0), (2, 1), (1, 4)):
        expected = []
        for place in (column * resolution, row * resolution):
            angles = [place / 10000 ** (i / 4) for i in range(4)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(table[row * columns + column], torch.tensor(expected))


def test_same_place_on_the_ground_has_the_same_position() -> None:
    coarse = sincos_positions(32, (2, 2), resolution=20.0).unflatten(0, (2, 2))
    fine = sincos_positions(32, (4, 4), resolution=10.0).unflatten(0, (4, 4))
    torch.testing.assert_close(coarse, fine[::2, ::2])


def test_class_token_comes_first_and_is_zero() -> None:
    table = sincos_positions(8, (2, 3), class_token=True)
    assert table.shape == (7, 8)
    assert not table[0].any()
    torch.testing.assert_close(table[1:], sincos_positions(8, (2, 3)))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"dim": 6, "grid": (2, 2)}, "dim: got 6"),
        ({"dim": 0, "grid": (2, 2)}, "dim: got 0"),
        ({"dim": 8, "grid": (0, 2)}, "grid: got 0x2"),
        ({"dim": 8, "grid": (2, 2), "resolution": 0.0}, "resolution: got 0.0"),
        ({"dim": 8, "grid": (2, 2), "resolution": math.nan}, "resolution: got nan"),
    ],
)
def test_errors_name_the_argument(arguments: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        sincos_positions(**arguments)
