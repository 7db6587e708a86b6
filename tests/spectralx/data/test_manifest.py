"""Checksums of a data set: changed tiles are found when they are read, and all at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from scipy.io import savemat

from spectralx.data import DataError, read_raster, write_raster
from spectralx.data.manifest import MANIFEST, main, write_manifest
from spectralx.data.mts12 import read_mat_label


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    write_raster(folder / "a.tif", np.ones((1, 4, 5), dtype=np.uint16))
    savemat(tmp_path / "a_label.mat", {"label": np.ones((4, 5))})
    write_manifest(tmp_path)
    return tmp_path


def flip(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_changed_tile_is_refused(tiles: Path) -> None:
    tile, label = tiles / "images" / "a.tif", tiles / "a_label.mat"
    assert read_raster(tile).sum() == 20
    assert read_mat_label(label).sum() == 20
    for path, read in ((tile, read_raster), (label, read_mat_label)):
        flip(path)
        wanted = rf"{path.name}: found sha256 .*; expected .*{MANIFEST}"
        with pytest.raises(DataError, match=wanted):
            read(path)
        flip(path)
        assert read(path).sum() == 20


def test_what_is_not_listed_is_read(tiles: Path) -> None:
    other = tiles / "images" / "b.tif"
    write_raster(other, np.ones((1, 2, 2), dtype=np.uint8))
    assert read_raster(other).sum() == 4


def test_all_at_once(tiles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiles), "--check"]) == 0
    assert "0 files differ" in capsys.readouterr().out
    flip(tiles / "images" / "a.tif")
    (tiles / "a_label.mat").unlink()
    assert main([str(tiles), "--check"]) == 1
    out = capsys.readouterr().out
    assert "a_label.mat: found no such file" in out
    assert "a.tif: found sha256 " in out
    assert "2 files differ" in out
    for argv in ([str(tiles / "images"), "--check"], [str(tiles / "nothing")]):
        assert main(argv) == 2
        assert capsys.readouterr().err.startswith("spectralx.data.manifest: error: ")


def test_a_declared_size_is_not_believed(tmp_path: Path) -> None:
    """A header of 960 GB is refused before anything is allocated."""
    path = tmp_path / "bomb.tif"
    profile = {"driver": "GTiff", "width": 400_000, "height": 400_000, "count": 3, "tiled": True,
               "dtype": "uint16", "blockxsize": 16384, "blockysize": 16384, "SPARSE_OK": "TRUE",
               "BIGTIFF": "YES"}  # fmt: skip
    with rasterio.open(path, "w", **profile):
        pass
    with pytest.raises(DataError, match=r"bomb\.tif: found 3 bands of .*, 960,000,000,000 bytes"):
        read_raster(path)
