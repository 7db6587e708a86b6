from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasterio import Affine

from spectralx.cli import InputError
from spectralx.prediction.tiles import (
    map_offset,
    overlap_cells,
    plan_axis,
    tile_pixels,
    whole_cells,
)

AXES = st.builds(
    lambda pixels, tile, cell, share, offset: plan_axis(
        pixels, tile=tile, cell=cell, overlap=overlap_cells(share, tile), offset=offset
    ),
    st.integers(1, 700),
    st.integers(4, 60),
    st.integers(1, 9),
    st.floats(0, 0.5),
    st.integers(-(10**6), 10**6),
)


@given(AXES)
def test_tiles_cover_every_pixel_and_overlap(axis) -> None:
    assert axis.starts[0] == 0
    assert axis.starts[-1] + axis.tile == axis.cells
    assert -axis.cell < axis.origin <= 0
    assert axis.origin + axis.cells * axis.cell >= axis.pixels
    steps = np.diff(axis.starts)
    assert (steps > 0).all()
    assert (steps <= axis.tile - axis.overlap).all()
    covered = np.zeros(axis.cells)
    for start in axis.starts:
        covered[start : start + axis.tile] += axis.weights()
    assert (covered > 0).all()


@given(AXES)
def test_every_cell_is_settled_once_and_restarts_reach_what_is_left(axis) -> None:
    ends = [axis.emitted(tile) for tile in range(-1, len(axis.starts))]
    assert ends[0] == 0
    assert ends[-1] == axis.cells
    assert ends == sorted(ends)
    for done in range(len(axis.starts)):
        first = axis.restart(done)
        assert first <= done
        # The cell before the first unsettled one gets all of its tiles again.
        needed = max(ends[done] - 1, 0)
        assert all(start + axis.tile <= needed for start in axis.starts[:first])


@given(st.integers(40, 400), st.integers(0, 300), st.integers(1, 4), st.integers(-500, 500))
def test_parts_of_a_scene_share_their_inner_tiles(pixels, cut, cell, offset) -> None:
    sizes = {"tile": 16, "cell": cell, "overlap": 4}
    whole = plan_axis(pixels + cut, offset=offset, **sizes)
    part = plan_axis(pixels, offset=offset + cut, **sizes)
    side = 16 * cell

    def inside(axis, first):  # pixel of the whole scene where inner tiles begin
        begins = [first + axis.origin + start * cell for start in axis.starts]
        return {one for one in begins if cut + side <= one and one + side <= pixels + cut - side}

    assert inside(whole, 0) == inside(part, cut)


def test_neighbours_weigh_one_together() -> None:
    axis = plan_axis(10_000, tile=56, cell=4, overlap=14)
    weights = axis.weights()
    np.testing.assert_allclose(weights[-14:] + weights[:14], 1.0, atol=1e-6)
    assert (weights[14:-14] == 1).all()
    assert 0 < weights[0] < 0.01


def test_a_scene_of_one_tile_is_not_cut() -> None:
    axis = plan_axis(30, tile=8, cell=4, overlap=2, offset=7)
    assert (axis.origin, axis.starts) == (0, (0,))


def test_offsets_are_whole_pixels_of_the_map() -> None:
    assert map_offset(Affine(10, 0, 300_000, 0, -10, 4e6)) == (-400_000, 30_000)
    # Coordinates of pixel centres, off by round-off to either side.
    for off in (-1e-7, 1e-7):
        assert map_offset(Affine(10, 0, 300_005 + off, 0, -10, 3_999_995 + off)) == (
            -400_000 + 0,
            30_000,
        )
    assert map_offset(Affine(7, 7, 0, 7, -7, 0)) == (0, 0)


def test_windows_are_whole_cells() -> None:
    assert whole_cells((512, 20), (56, 56)) == (504, 56)
    assert tile_pixels(560, (56, 56)) == (560, 560)
    assert tile_pixels((112, 56), (56, 56)) == (112, 56)
    with pytest.raises(InputError, match=r"window: found 512 x 512 .* for example 504 x 504"):
        tile_pixels(512, (56, 56))
    with pytest.raises(InputError, match=r"overlap: found 0\.6; expected 0 to 0\.5"):
        overlap_cells(0.6, 56)
    assert overlap_cells(0.0, 56) == 1
