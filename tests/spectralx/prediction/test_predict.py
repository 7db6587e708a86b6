from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from matplotlib.image import imread
from rasterio import Affine
from rasterio.control import GroundControlPoint

from spectralx.data import ImageMinMax, read_image, read_raster
from spectralx.pictures import class_colours
from spectralx.predict import Options, Predictor, predict_scene
from spectralx.prediction.bands import for_bands
from tests.spectralx.prediction.scenes import (
    CLASS_NAMES,
    SIDE,
    WAVELENGTHS,
    pixels,
    save_model,
    write_scene,
)


def predict(predictor: Predictor, scene: Path, output: Path, **options: Any) -> np.ndarray:
    made = predict_scene(
        predictor, scene, output, Options(**({"quicklook": False} | options)), progress=False
    )
    return np.asarray(read_raster(made.map)[0])


def plain_blend(predictor: Predictor, scene: Path, plan: Any) -> np.ndarray:
    """The map by definition: float64 sums of upsampled, weighted logits over the whole scene."""
    rows, columns = plan.rows, plan.columns
    values, valid, _ = read_image(scene)
    images = torch.from_numpy(predictor.normalisation(values, valid))
    tile = (rows.tile * rows.cell, columns.tile * columns.cell)
    shape = (rows.cells, columns.cells)
    sums = torch.zeros(len(predictor.class_names), *shape, dtype=torch.float64)
    weights = torch.zeros(shape, dtype=torch.float64)
    window = torch.from_numpy(np.outer(rows.weights(), columns.weights()).astype(np.float64))
    before = (-rows.origin, -columns.origin)
    after = [axis.origin + axis.cells * axis.cell - axis.pixels for axis in (rows, columns)]
    beyond = [(0, 0), (before[0], after[0]), (before[1], after[1])]
    padded = torch.from_numpy(np.pad(images.numpy(), beyond, mode="symmetric"))
    for top in rows.starts:
        for left in columns.starts:
            part = padded[:, top * rows.cell :, left * columns.cell :][:, : tile[0], : tile[1]]
            logits = predictor.logits(part[None])[0].double()
            area = (slice(top, top + rows.tile), slice(left, left + columns.tile))
            sums[(slice(None), *area)] += logits * window
            weights[area] += window
    size = (rows.cells * rows.cell, columns.cells * columns.cell)
    upsampled = torch.nn.functional.interpolate((sums / weights)[None], size, mode="bilinear")[0]
    inner = upsampled[:, before[0] : before[0] + rows.pixels]
    return inner[:, :, before[1] : before[1] + columns.pixels].softmax(0).numpy()


def test_a_scene_of_the_models_size_is_what_the_model_says(
    predictor: Predictor, tmp_path: Path
) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(5, SIDE, SIDE), corner=(3, 5))
    values, valid, _ = read_image(scene)
    images = torch.from_numpy(ImageMinMax()(values, valid))[None]
    expected = predictor.model.predict(images)[0].numpy()
    found = predict(predictor, scene, tmp_path / "map.tif")
    assert np.array_equal(found, expected)
    assert len(np.unique(found)) > 2


@pytest.mark.parametrize("shape", [(1, 1), (7, 90), (75, 20), (111, 83)])
def test_scenes_of_any_size_are_the_blend_by_definition(
    fixed: Predictor, tmp_path: Path, shape: tuple[int, int]
) -> None:
    from spectralx.prediction.job import prepare

    scene = write_scene(tmp_path / "scene.tif", pixels(5, *shape), corner=(9, 2))
    options = Options(probabilities="all", quicklook=False, batch_size=3)
    job = prepare(fixed, scene, tmp_path / "map.tif", options)
    if min(shape) > SIDE:
        expected = plain_blend(fixed, scene, job)
    found = predict(fixed, scene, tmp_path / "map.tif", probabilities="all", batch_size=3)
    assert found.shape == shape
    shares = read_raster(tmp_path / "map_probability.tif") / 254
    assert shares.shape == (len(CLASS_NAMES), *shape)
    np.testing.assert_allclose(shares.sum(0), 1.0, atol=3 / 254)
    if min(shape) > SIDE:
        np.testing.assert_allclose(shares, expected, atol=0.6 / 254)
        clear = np.sort(expected, axis=0)[-1] - np.sort(expected, axis=0)[-2] > 1e-4
        assert np.array_equal(found[clear], expected.argmax(0)[clear])
        assert clear.mean() > 0.99


def test_quarters_have_the_map_of_the_whole(
    fixed: Predictor, predictor: Predictor, tmp_path: Path
) -> None:
    values = pixels(5, 172, 161, seed=1)
    whole = write_scene(tmp_path / "whole.tif", values)
    cut = (87, 82)  # on no boundary of tiles or cells
    reach = SIDE + 4  # a tile that ends with the part, and the cell that upsampling looks at
    for name, model in (("fixed", fixed), ("image", predictor)):
        options = {} if name == "fixed" else {"statistics_from": str(whole)}
        expected = predict(model, whole, tmp_path / f"whole-{name}.tif")
        places = [(0, 0), (0, 1), (1, 0), (1, 1)]
        for place, (row, column) in enumerate(places if name == "fixed" else places[2:3]):
            area = tuple(
                slice(side, None) if half else slice(0, side)
                for half, side in zip((row, column), cut, strict=True)
            )
            corner = (row * cut[0], column * cut[1])
            part = write_scene(
                tmp_path / f"{name}-{place}.tif", values[(slice(None), *area)], corner=corner
            )
            found = predict(model, part, tmp_path / f"map-{name}-{place}.tif", **options)
            inner = tuple(
                slice(reach, None) if half else slice(0, -reach) for half in (row, column)
            )
            assert np.array_equal(found[inner], expected[area][inner])
            assert found[inner].size > 2000
            assert (found != expected[area]).any()  # nearer the cut it may differ, and does


def test_no_seam_is_seen_where_tiles_end(fixed: Predictor, tmp_path: Path) -> None:
    # Steps between neighbouring pixels are no larger across the ends of tiles than elsewhere.
    scene = write_scene(tmp_path / "scene.tif", pixels(5, 130, 130, seed=2), crs=None,
                        transform=Affine(1, 0, 0, 0, 1, 0))  # fmt: skip
    predict(fixed, scene, tmp_path / "map.tif", probabilities="all", overlap=0.5)
    shares = read_raster(tmp_path / "map_probability.tif").astype(float)
    steps = np.abs(np.diff(shares, axis=2)).mean(axis=(0, 1))
    ends = list(range(15, 128, 16))  # the last column before a tile begins
    assert steps[ends].mean() < 1.3 * np.delete(steps, ends).mean()


def test_the_map_has_what_the_scene_has(fixed: Predictor, tmp_path: Path) -> None:
    values = pixels(5, 60, 100)
    values[:, 20:31, 40:77] = 0
    values[2, 50, 3] = 0  # one band missing: still a pixel
    scene = write_scene(tmp_path / "scene.tif", values, nodata=0)
    with rasterio.open(scene, "r+") as target:
        target.update_tags(ACQUIRED="2026-05-04", AREA_OR_POINT="Point")
    output = tmp_path / "new" / "map.tif"
    made = predict_scene(fixed, scene, output, Options(probabilities="top"), progress=False)
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "map.png", "map.tif", "map.tif.aux.xml", "map_probability.tif",
    ]  # fmt: skip
    missing = np.zeros((60, 100), dtype=bool)
    missing[20:31, 40:77] = True
    with rasterio.open(scene) as source, rasterio.open(output) as result:
        assert result.crs == source.crs
        assert result.transform == source.transform
        assert (result.height, result.width, result.count) == (60, 100, 1)
        assert result.dtypes == ("uint8",)
        assert result.nodata == 0
        assert result.compression.name == "deflate"
        assert result.tags()["ACQUIRED"] == "2026-05-04"
        assert result.tags()["AREA_OR_POINT"] == "Point"
        assert result.tags()["SPECTRALX_WAVELENGTHS_UM"] == "0.48, 0.56, 0.665, 0.842, 1.61"
        assert json.loads(result.tags(1)["CLASS_NAMES"]) == CLASS_NAMES
        colours = result.colormap(1)
        labels = result.read(1)
        assert np.array_equal(result.dataset_mask() == 0, labels == 0)
    table = class_colours(len(CLASS_NAMES))
    for index in range(1, len(CLASS_NAMES)):
        assert colours[index] == tuple(round(255 * part) for part in table(index))
    assert (labels[missing] == 0).all()
    assert labels[50, 3] > 0
    assert (labels[~missing] > 0).mean() > 0.95
    with rasterio.open(tmp_path / "new" / "map_probability.tif") as result:
        probability = result.read(1)
        assert result.nodata == 255
        assert result.scales == (pytest.approx(1 / 254),)
        assert result.crs.to_epsg() == 32650
    assert np.array_equal(probability == 255, missing)
    assert probability[~missing].min() >= 254 // len(CLASS_NAMES)
    # Names where viewers look for them, as GDAL reads them back.
    rasterio.shutil.copy(output, tmp_path / "map.vrt", driver="VRT")
    text = (tmp_path / "map.vrt").read_text()
    assert "<Category>built-up</Category>" in text
    assert "<Category>bare &amp; dry</Category>" in text
    counted = np.bincount(labels.ravel(), minlength=len(CLASS_NAMES)) / labels.size
    for index, name in enumerate(CLASS_NAMES):
        assert made.shares.get(name, 0.0) == pytest.approx(counted[index])


def test_control_points_are_kept(fixed: Predictor, tmp_path: Path) -> None:
    points = [
        GroundControlPoint(row, column, 300_000 + 10 * column, 4e6 - 10 * row)
        for row, column in ((0, 0), (0, 40), (40, 0), (40, 40))
    ]
    scene = tmp_path / "scene.tif"
    values = pixels(5, 40, 40)
    with rasterio.open(
        scene, "w", driver="GTiff", count=5, height=40, width=40, dtype="uint16",
        gcps=points, crs="EPSG:32650",
    ) as target:  # fmt: skip
        target.write(values)
    predict(fixed, scene, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as result:
        found, crs = result.gcps
        assert crs.to_epsg() == 32650
        assert [(p.row, p.col, p.x, p.y) for p in found] == [
            (p.row, p.col, p.x, p.y) for p in points
        ]


def test_large_maps_have_overviews_and_tiles(fixed: Predictor, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(5, 530, 700))
    predict(fixed, scene, tmp_path / "map.tif", window=128, overlap=0.1, batch_size=16)
    with rasterio.open(tmp_path / "map.tif") as result:
        assert result.overviews(1) == [2]
        assert result.block_shapes == [(512, 512)]
        assert result.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_larger_windows_are_resized_as_in_training(fixed: Predictor, tmp_path: Path) -> None:
    from spectralx.data.augment import Resize

    side = 3 * SIDE
    scene = write_scene(tmp_path / "scene.tif", pixels(5, side, side))
    values, valid, _ = read_image(scene)
    image = torch.from_numpy(fixed.normalisation(values, valid))
    small, _ = Resize(SIDE)(image, torch.zeros(1, 1), torch.Generator())
    expected = fixed.model.predict(small[None], (side, side))[0].numpy()
    assert np.array_equal(predict(fixed, scene, tmp_path / "map.tif", window=side), expected)


def test_bands_are_found_by_wavelength_and_adapted_when_asked(
    fixed: Predictor, predictor: Predictor, tmp_path: Path
) -> None:
    values = pixels(5, 50, 40)
    expected = predict(fixed, write_scene(tmp_path / "a.tif", values), tmp_path / "map-a.tif")
    order = [4, 2, 0, 3, 1]
    more = np.concatenate([values[order], pixels(1, 50, 40, seed=9)])
    stated = [f"{1000 * WAVELENGTHS[band]:.0f} nm" for band in order] + ["945 nm"]
    scene = write_scene(tmp_path / "b.tif", more, descriptions=stated)
    assert np.array_equal(predict(fixed, scene, tmp_path / "map-b.tif"), expected)
    silent = write_scene(tmp_path / "c.tif", values, descriptions=None)
    assert np.array_equal(predict(fixed, silent, tmp_path / "map-c.tif"), expected)

    other = [0.49, 0.6, 0.7, 0.85, 1.3, 1.65]
    scene = write_scene(
        tmp_path / "d.tif",
        pixels(6, SIDE, SIDE),
        descriptions=[f"{wavelength} um" for wavelength in other],
    )
    with pytest.raises(ValueError, match=r"d\.tif: found 6 bands .*none for 0\.480 um"):
        predict(predictor, scene, tmp_path / "map-d.tif")
    found = predict(predictor, scene, tmp_path / "map-d.tif", adapt_bands=True)
    image = torch.from_numpy(ImageMinMax()(*read_image(scene)[:2]))[None]
    assert np.array_equal(found, for_bands(predictor.model, other).predict(image)[0].numpy())


def test_the_quicklook_shows_scene_map_and_legend(fixed: Predictor, tmp_path: Path) -> None:
    values = pixels(5, 80, 120)
    values[:, :30] = 0
    scene = write_scene(tmp_path / "scene.tif", values, nodata=0)
    labels = predict(fixed, scene, tmp_path / "map.tif", quicklook=True)
    drawn = imread(tmp_path / "map.png")[..., :3]
    table = class_colours(len(CLASS_NAMES))
    area = {}
    for index in range(1, len(CLASS_NAMES)):
        colour = np.asarray(table(index)[:3])
        area[index] = np.isclose(drawn, colour, atol=0.01).all(-1).sum()
    # Areas in the picture go as the classes do.
    counts = {index: int((labels == index).sum()) for index in area}
    assert sorted(area, key=area.__getitem__) == sorted(counts, key=counts.__getitem__)
    assert drawn.shape[1] > drawn.shape[0]


def test_fixed_statistics_take_no_others(fixed: Predictor, tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(5, 40, 40))
    with pytest.raises(ValueError, match=r"statistics_from: found .*; expected none"):
        predict(fixed, scene, tmp_path / "map.tif", statistics_from=str(scene))


def test_a_checkpoint_of_a_rectangular_model(tmp_path: Path) -> None:
    path = save_model(tmp_path / "checkpoint", image_size=(32, 64), tokenizer="conv")
    scene = write_scene(tmp_path / "scene.tif", pixels(5, 70, 130))
    made = predict_scene(path, scene, tmp_path / "map.tif", device="cpu", progress=False)
    labels = read_raster(made.map)[0]
    assert labels.shape == (70, 130)
    assert len(np.unique(labels)) > 2
