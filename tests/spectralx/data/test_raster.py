from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio import Affine

from spectralx.data import DataError, raster_info, read_image, read_raster, write_raster
from spectralx.data.raster import list_rasters, read_label, whole_numbers
from spectralx.data.wavelengths import parse_wavelength

RNG = np.random.default_rng(0)


def _pixels(dtype: str, shape: tuple[int, ...] = (3, 9, 7)) -> np.ndarray:
    return (RNG.uniform(0, 200, shape)).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    path, pixels = tmp_path / "a.tif", _pixels(dtype)
    write_raster(
        path,
        pixels,
        crs="EPSG:32650",
        transform=Affine(10, 0, 3e5, 0, -10, 4e6),
        nodata=7,
        descriptions=["0.466 um", "480 nm", "band 3 (500.5 Nanometers)"],
    )
    read = read_raster(path)
    info = raster_info(path)
    assert read.dtype == pixels.dtype
    assert np.array_equal(read, pixels)
    assert (info.bands, info.height, info.width, info.dtype) == (3, 9, 7, dtype)
    assert info.nodata == 7
    assert info.crs.to_epsg() == 32650
    assert info.transform.a == 10
    assert info.wavelengths == pytest.approx((0.466, 0.480, 0.5005))
    assert list(tmp_path.iterdir()) == [path]


def test_windows_and_bands_are_parts(tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.tif", _pixels("uint16")
    write_raster(path, pixels)
    part = read_raster(path, bands=[2, 0], window=(1, 3, 4, 2))
    assert np.array_equal(part, pixels[[2, 0], 1:5, 3:5])


@pytest.mark.parametrize("window", [(-1, 0, 2, 2), (8, 0, 2, 2), (0, 6, 1, 2), (0, 0, 0, 1)])
def test_windows_outside_are_refused(tmp_path: Path, window: tuple[int, int, int, int]) -> None:
    path = tmp_path / "a.tif"
    write_raster(path, _pixels("uint16"))
    with pytest.raises(DataError, match=r"a\.tif: found 9x7 pixels; expected the window"):
        read_raster(path, window=window)


def test_bands_outside_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_raster(path, _pixels("uint16"))
    with pytest.raises(DataError, match="found 3 bands; expected bands"):
        read_raster(path, bands=[0, 3])


def test_missing_values(tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.tif", _pixels("float32") + 1
    pixels[0, 0, 0], pixels[1, 2, 3], pixels[2, 4, 4] = -32768.0, np.nan, np.inf
    write_raster(path, pixels, nodata=-32768.0)
    values, valid, _ = read_image(path)
    missing = [tuple(place) for place in np.argwhere(~valid).tolist()]
    assert missing == [(0, 0, 0), (1, 2, 3), (2, 4, 4)]
    assert (values[~valid] == 0).all()
    assert np.array_equal(values[valid], pixels[valid])


def test_nodata_of_the_configuration_serves_files_without_one(tmp_path: Path) -> None:
    stated, silent = tmp_path / "stated.tif", tmp_path / "silent.tif"
    pixels = np.array([[[1, 2], [3, 4]]], dtype=np.uint16)
    write_raster(stated, pixels, nodata=2)
    write_raster(silent, pixels)
    assert read_image(stated, nodata=3)[1].tolist() == [[[True, False], [True, True]]]
    assert read_image(silent, nodata=3)[1].tolist() == [[[True, True], [False, True]]]


@pytest.mark.parametrize("compress", [None, "deflate", "lzw"])
@pytest.mark.parametrize("interleaved", [1, 32])
def test_truncated_files_are_found(tmp_path: Path, compress: str | None, interleaved: int) -> None:
    path = tmp_path / "whole.tif"
    write_raster(
        path,
        _pixels("uint16", (interleaved, 40, 40)),
        compress=compress,
        descriptions=["0.5 um"] * interleaved,
        crs="EPSG:32650",
        nodata=0,
    )
    content = path.read_bytes()
    cut = tmp_path / "cut.tif"
    for length in [*np.linspace(0, len(content) - 1, 25).astype(int).tolist(), len(content) - 2]:
        cut.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cut\.tif: found .*; expected a .*GeoTIFF") as caught:
            read_raster(cut)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}])
def test_tags_are_followed_in_every_kind_of_tiff(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "a.tif"
    pixels = _pixels("uint16", (2, 20, 20))
    profile = {"count": 2, "height": 20, "width": 20, "dtype": "uint16", "crs": "EPSG:32650"}
    with rasterio.open(
        path, "w", driver="GTiff", transform=Affine(10, 0, 0, 0, -10, 0), **profile, **options
    ) as target:
        target.write(pixels)
        target.set_band_description(1, "0.5 um and a long text")
    assert np.array_equal(read_raster(path), pixels)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="found a file 1 bytes too short for its tags"):
        read_raster(path)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    real, fake = tmp_path / "real.tif", tmp_path / "virtual.tif"
    write_raster(real, _pixels("uint8", (1, 4, 4)))
    fake.write_text(
        '<VRTDataset rasterXSize="4" rasterYSize="4"><VRTRasterBand dataType="Byte" band="1">'
        '<SimpleSource><SourceFilename relativeToVRT="1">real.tif</SourceFilename></SimpleSource>'
        "</VRTRasterBand></VRTDataset>"
    )
    with pytest.raises(DataError, match=r"virtual\.tif: found .*; expected a GeoTIFF"):
        read_raster(fake)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.tif: found no such file; expected a GeoTIFF"):
        read_raster(tmp_path / "absent.tif")


def test_band_count_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_raster(path, _pixels("uint16"))
    with pytest.raises(DataError, match=r"a\.tif: found 3 bands; expected 4"):
        read_image(path, count=4)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_raster(path, _pixels("uint8"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="descriptions: found 1; expected 3"):
        write_raster(path, _pixels("uint8"), descriptions=["1"])
    with pytest.raises(DataError, match="found no way to write it"):
        write_raster(tmp_path / "no folder" / "b.tif", _pixels("uint8"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_labels(tmp_path: Path) -> None:
    path = tmp_path / "label.tif"
    write_raster(path, np.array([[0, 3], [255, 2]], dtype=np.uint8), nodata=255)
    label = read_label(path)
    assert label.dtype == np.int64
    assert label.tolist() == [[0, 3], [0, 2]]
    write_raster(path, np.array([[0.0, 1.5]], dtype=np.float32))
    with pytest.raises(DataError, match=r"found label value 1\.5; expected whole numbers"):
        read_label(path)
    write_raster(path, _pixels("uint8", (2, 3, 3)))
    with pytest.raises(DataError, match="found 2 bands; expected a label map of 1 band"):
        read_label(path)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_labels_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=rf"mine: found label value {value:g}; expected whole"):
        whole_numbers("mine", np.array([[1.0, value]]))


def test_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "note.txt").touch()
    with pytest.raises(DataError, match=r"found no GeoTIFF; expected .*: train is empty"):
        list_rasters(tmp_path, "train")
    with pytest.raises(DataError, match=r"gone: found no such folder; expected the folder of val"):
        list_rasters(tmp_path / "gone", "val")


@pytest.mark.parametrize(
    ("text", "micrometres"),
    [
        ("band 1 (418.24 Nanometers)", 0.41824),
        ("0.466 um", 0.466),
        ("B8A 865nm", 0.865),
        ("2.19 µm", 2.19),
        ("1.61 micrometres", 1.61),
        ("842", 0.842),
        ("0.842", 0.842),
        ("B02", None),
        ("band 12", None),
        ("", None),
    ],
)
def test_wavelengths_are_understood(text: str, micrometres: float | None) -> None:
    expected = None if micrometres is None else pytest.approx(micrometres)
    assert parse_wavelength(text) == expected


def test_wavelengths_need_every_band(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_raster(path, _pixels("uint8", (2, 3, 3)), descriptions=["0.5 um", "red"])
    assert raster_info(path).wavelengths is None


def test_wavelengths_of_band_tags(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    write_raster(path, _pixels("uint8", (2, 3, 3)), transform=Affine(10, 0, 0, 0, -10, 0))
    with rasterio.open(path, "r+") as target:
        target.update_tags(1, wavelength="550", wavelength_units="Nanometers")
        target.update_tags(2, ns="IMAGERY", CENTRAL_WAVELENGTH_UM="0.842")
    assert raster_info(path).wavelengths == pytest.approx((0.550, 0.842))
