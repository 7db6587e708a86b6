"""The synthetic scenes: physics, determinism, writing all or nothing, and the gap of domains."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from spectralx.data import DataError, Dfc2020, Mts12, TileDataset, WhuOhsTransfer, raster_info
from spectralx.data.dfc2020 import SEASONS
from spectralx.data.scenes import LAYOUTS, spectra, write, write_scenes
from spectralx.data.scenes.__main__ import main
from spectralx.data.scenes.domains import Season
from spectralx.data.scenes.landscape import COVER, ZONES, draw_landscape, noise
from spectralx.data.scenes.regions import DFC2020, MTS12_NORTH, WHU_OHS
from spectralx.data.scenes.render import MATERIALS, endmembers, mixtures, render

MICROMETRES = np.arange(0.40, 2.41, 0.01)


def _at(spectrum: np.ndarray, micrometres: float) -> float:
    return float(np.interp(micrometres, MICROMETRES, spectrum))


# --- physics


def test_leaves_have_a_red_edge_and_water_bands() -> None:
    leaf = spectra.leaves(MICROMETRES, spectra.Leaves())
    assert _at(leaf, 0.55) > _at(leaf, 0.67)
    assert _at(leaf, 0.80) > 6 * _at(leaf, 0.67)
    assert _at(leaf, 1.45) < 0.5 * _at(leaf, 1.30)
    assert _at(leaf, 1.94) < _at(leaf, 1.65) < _at(leaf, 0.80)
    steepest = MICROMETRES[np.argmax(np.diff(leaf)[:45])]
    assert 0.69 < steepest < 0.74
    pale = spectra.leaves(MICROMETRES, spectra.Leaves(chlorophyll=0.4))
    assert _at(pale, 0.55) > _at(leaf, 0.55)
    dry = spectra.leaves(MICROMETRES, spectra.Leaves(water=0.3))
    assert _at(dry, 1.65) > _at(leaf, 1.65)


def test_other_materials_look_as_they_should() -> None:
    soil = spectra.soil(MICROMETRES, spectra.Soil())
    assert (np.diff(soil[:40]) > 0).all()
    red = spectra.soil(MICROMETRES, spectra.Soil(iron=1.5))
    assert _at(red, 0.65) / _at(red, 0.45) > _at(soil, 0.65) / _at(soil, 0.45)
    wet = spectra.soil(MICROMETRES, spectra.Soil(moisture=0.9))
    assert (wet < soil).all()
    water = spectra.water(MICROMETRES, spectra.Water())
    assert _at(water, 0.85) < 0.02 < _at(water, 0.55)
    assert _at(spectra.water(MICROMETRES, spectra.Water(sediment=1.0)), 0.65) > _at(water, 0.65)
    concrete = spectra.concrete(MICROMETRES, spectra.Roofs())
    assert concrete.max() / concrete.min() < 1.5
    snow = spectra.snow(MICROMETRES)
    assert _at(snow, 0.55) > 0.8 > 0.3 > _at(snow, 1.6)


def test_all_reflectances_are_between_nothing_and_all() -> None:
    for domain in (WHU_OHS["S"], WHU_OHS["T"], MTS12_NORTH, DFC2020["autumn"]["CapeTown"]):
        table = endmembers(domain.region, domain.dates[0], MICROMETRES)
        assert table.shape == (len(MATERIALS), len(MICROMETRES))
        assert table.min() > 0
        assert table.max() < 1


def test_seasons_turn() -> None:
    summer = Season(rise=110, fall=290)
    assert summer.greenness(200) > 0.9 > 0.1 > summer.greenness(20)
    winter = Season(rise=300, fall=120)
    assert winter.greenness(20) > 0.9 > 0.1 > winter.greenness(200)


def test_mixtures_are_whole_and_follow_the_year() -> None:
    region = WHU_OHS["S"].region
    for day in range(1, 366, 20):
        for cover, mixture in mixtures(region, day, 50.0, 0.2).items():
            assert cover in COVER
            assert set(mixture) <= set(MATERIALS)
            assert sum(mixture.values()) == pytest.approx(1)
            assert min(mixture.values()) >= 0
    june, august, december = (mixtures(region, day, 50.0, 0.0)["paddy"] for day in (158, 230, 350))
    assert june["lake"] > 0.4
    assert august["crop"] > 0.8
    assert december["dry"] > 0.5


@pytest.mark.parametrize("zone", ZONES)
def test_every_kind_of_zone_can_be_drawn(zone: str) -> None:
    scene = draw_landscape(40, np.random.default_rng(0), {zone: 1.0}, rivers=1.0, lakes=1.0)
    assert scene.cover.shape == (40, 40)
    assert scene.unit.min() >= 1
    assert COVER["river"] in scene.cover


def test_noise_is_standard_and_smooth() -> None:
    field = noise(96, 12.0, np.random.default_rng(0))
    assert field.mean() == pytest.approx(0, abs=1e-9)
    assert field.std() == pytest.approx(1)
    assert np.abs(np.diff(field, axis=0)).mean() < 0.3


def test_borders_mix() -> None:
    """At a shore the reflectance lies between the land's and the water's."""
    domain = WHU_OHS["S"]
    rng = np.random.default_rng(1)
    scene = draw_landscape(64, rng, {"paddies": 1.0}, rivers=0.0, lakes=1.0)
    infrared = render(scene, domain, rng)[25].astype(float)
    lake = scene.cover == COVER["lake"]
    shore = np.zeros_like(lake)
    for axis, step in itertools.product((0, 1), (-1, 1)):
        shore |= lake & ~np.roll(lake, step, axis)
    inner = lake & ~shore
    assert inner.sum() > 30
    assert infrared[inner].mean() < infrared[shore].mean()


# --- writing


def _digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_same_seed_writes_the_same_files(tmp_path: Path, layout: str) -> None:
    made = [
        _digests(write_scenes(layout, tmp_path / name, size=20, count=3, seed=seed, progress=False))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert made[0] == made[1]
    assert made[0].keys() == made[2].keys()
    assert all(made[0][name] != made[2][name] for name in made[0] if "image" in name)


@pytest.mark.parametrize(
    ("layout", "bands", "name"),
    [
        ("whu-ohs", 32, "transfer-STall/source/image/S1_0001.tif"),
        ("dfc2020", 13, "winter/image/s2_Chabarowsk/ROIs0000_winter_s2_Chabarowsk_p0.tif"),
        ("mts12", 24, "image/train/patch_0000.tif"),
    ],
)
def test_files_are_georeferenced_scaled_reflectance(
    tmp_path: Path, layout: str, bands: int, name: str
) -> None:
    root = write_scenes(layout, tmp_path / "out", size=20, count=3, progress=False)
    info = raster_info(root / name)
    assert (info.bands, info.height, info.width, info.dtype) == (bands, 20, 20, "uint16")
    assert info.crs.is_projected
    assert (info.transform.a, info.transform.e) == (10, -10)
    assert info.wavelengths is not None
    assert len(info.wavelengths) == bands
    with rasterio.open(root / name) as source:
        pixels = source.read()
        label = root / name.replace("image", "label").replace("s2", "dfc")
        if label.suffix == ".tif" and label.exists():
            with rasterio.open(label) as other:
                assert other.transform == source.transform
                assert other.dtypes == ("uint8",)
    assert 200 < pixels.mean() < 5000
    assert pixels.max() < 12000


def test_water_vapour_hides_the_ground_at_the_cirrus_band(tmp_path: Path) -> None:
    root = write_scenes("dfc2020", tmp_path / "out", size=20, count=3, progress=False)
    values, _ = Dfc2020(root, "spring").read_values(0)
    assert values[10].mean() < 0.1 * values[8].mean()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def interrupted(*arguments: Any) -> np.ndarray:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return render(*arguments)

    monkeypatch.setattr(write, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_scenes("whu-ohs", tmp_path / "out", size=20, count=3, progress=False)
    assert next(calls) == 5
    assert list(tmp_path.iterdir()) == []


def test_folders_with_content_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "tr").mkdir(parents=True)
    (out / "tr" / "old.tif").touch()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="out: found a folder that is not empty; expected an empty"):
        write_scenes("whu-ohs", out, size=20, count=3, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "tr"]
    write_scenes("whu-ohs", out, size=20, count=3, overwrite=True, progress=False)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["notes.txt", "tr", "transfer-STall", "ts", "val"]
    assert not (out / "tr" / "old.tif").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    write_scenes("mts12", out, size=20, count=3, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["image", "label"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "whu"], "invalid choice: 'whu'"),
        (["--layout", "mts12", "--sise", "3"], "unrecognized arguments: --sise 3"),
        (["--layout", "mts12", "--size", "4"], "size: found 4; expected at least 16"),
        (["--layout", "mts12", "--count", "2"], "count: found 2; expected at least 3"),
        (["--layout", "mts12", "--seed", "-1"], "seed: found -1; expected 0 or more"),
        (["--layout", "mts12", "--size", "big"], "invalid int value: 'big'"),
        ([], "the following arguments are required: --layout"),
    ],
)
def test_wrong_options_end_with_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("spectralx.data.scenes: error: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_and_refuses(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spectralx.data.scenes", "--layout", "mts12", "--out",
               str(tmp_path / "out"), "--size", "16", "--count", "3"]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(tmp_path / "out")
    assert "mts12 scenes: 100%" in first.stderr
    (tmp_path / "file").touch()
    for out in ("out", "file"):
        assert main(["--layout", "mts12", "--out", str(tmp_path / out)]) == 2


# --- the gap


class _Discriminant:
    """Linear discriminant analysis of pixels, equal priors, covariance shrunk a little."""

    def __init__(self, pixels: np.ndarray, classes: np.ndarray) -> None:
        self.classes = np.unique(classes)
        means = np.stack([pixels[classes == value].mean(0) for value in self.classes])
        within = pixels - means[np.searchsorted(self.classes, classes)]
        covariance = within.T @ within / len(pixels)
        covariance += 1e-4 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        self.weights = np.linalg.solve(covariance, means.T)
        self.offsets = -0.5 * np.einsum("kc,ck->k", means, self.weights)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        answers: np.ndarray = self.classes[(pixels @ self.weights + self.offsets).argmax(1)]
        return answers


def _pixels(
    dataset: TileDataset, indices: Sequence[int], *, scaled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Labelled pixels and classes: digital numbers, or scaled as the model sees them."""
    rng = np.random.default_rng(0)
    pixels, classes = [], []
    for index in indices:
        if scaled:
            sample = dataset[index]
            image, mask = sample["image"].double().numpy(), sample["mask"].numpy()
        else:
            image, mask = dataset.read_values(index)[0] / 1e4, dataset.read_classes(index)
        chosen = rng.permutation(np.flatnonzero(mask))[:1200]
        pixels.append(image.reshape(len(image), -1).T[chosen].astype(np.float64))
        classes.append(mask.flatten()[chosen])
    return np.concatenate(pixels), np.concatenate(classes)


def _mean_iou(truth: np.ndarray, answer: np.ndarray) -> float:
    """Over the classes present in the truth."""
    scores = [
        ((truth == value) & (answer == value)).sum() / ((truth == value) | (answer == value)).sum()
        for value in np.unique(truth)
    ]
    return float(np.mean(scores))


@pytest.mark.parametrize(("layout", "count"), [("whu-ohs", 14), ("dfc2020", 9), ("mts12", 12)])
def test_a_pixel_classifier_loses_15_points_on_other_domains(
    tmp_path: Path, layout: str, count: int
) -> None:
    root = write_scenes(layout, tmp_path / "out", size=96, count=count, progress=False)
    domains: dict[str, TileDataset]
    if layout == "whu-ohs":
        domains = {side: WhuOhsTransfer(root, side) for side in ("source", "target")}
    elif layout == "dfc2020":
        domains = {season: Dfc2020(root, season) for season in SEASONS}
    else:
        domains = {"north": Mts12(root, ("train", "validation")), "south": Mts12(root, "test")}
    for scaled in (False, True):
        for source, dataset in domains.items():
            held_out = range(count - 4, count)
            classify = _Discriminant(*_pixels(dataset, range(count - 4), scaled=scaled))
            pixels, truth = _pixels(dataset, held_out, scaled=scaled)
            own = _mean_iou(truth, classify(pixels))
            others = [
                _pixels(other, range(len(other)), scaled=scaled)
                for name, other in domains.items()
                if name != source
            ]
            pixels, truth = (np.concatenate(part) for part in zip(*others, strict=True))
            away = _mean_iou(truth, classify(pixels))
            assert own - away >= 0.15, (source, scaled, own, away)
            assert own >= (0.35 if scaled else 0.45), (source, scaled, own)
