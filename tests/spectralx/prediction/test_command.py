"""``python -m spectralx.predict``: files in and out, and what a checkpoint decides by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectralx import checkpoints
from spectralx.data import read_raster
from spectralx.predict import Predictor, find_scenes, load_predictor, main, name_outputs
from spectralx.segmentation import Segmentation
from tests.spectralx.prediction.scenes import CLASS_NAMES, WAVELENGTHS, pixels, write_scene


def test_the_command_takes_files_folders_and_patterns(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "scenes"
    folder.mkdir()
    for place, name in enumerate(["a.tif", "b.TIFF", "c.tif"]):
        write_scene(folder / name, pixels(5, 40, 40, seed=place))
    (folder / "notes.txt").write_text("no scene")
    assert [path.name for path in find_scenes([str(folder)])] == ["a.tif", "b.TIFF", "c.tif"]
    assert [path.name for path in find_scenes([str(folder / "[ab].*"), str(folder / "a.tif")])] == [
        "a.tif", "b.TIFF",
    ]  # fmt: skip
    maps = tmp_path / "maps"
    command = ["--checkpoint", str(checkpoint), "--device", "cpu", "--output", str(maps)]
    assert main([*command, "--input", str(folder / "*.tif"), "--progress", "false"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == [
        str(maps / "a.tif"), str(maps / "c.tif"),
    ]  # fmt: skip
    # The same command, and one for more: what is there already is left as it is.
    before = {path: path.stat().st_mtime_ns for path in maps.iterdir()}
    assert main([*command, "--input", str(folder)]) == 0
    shown = capsys.readouterr()
    assert [line.endswith("there already") for line in shown.out.splitlines()] == [
        True, False, True,
    ]  # fmt: skip
    assert "b.TIFF" in shown.err  # the progress bar
    assert before.items() <= {path: path.stat().st_mtime_ns for path in maps.iterdir()}.items()
    # Other options make another map: an error, unless it is to be replaced.
    assert main([*command, "--input", str(folder), "--overlap", "0.5"]) == 2
    assert "a.tif: found a file made of other input" in capsys.readouterr().err
    again = ["--overlap", "0.5", "--overwrite", "--progress", "false"]
    assert main([*command, "--input", str(folder), *again]) == 0
    assert not list(maps.glob(".*"))


def test_outputs_are_named_after_their_scenes(tmp_path: Path) -> None:
    scenes = [tmp_path / "a.tif", tmp_path / "b.tif"]
    assert name_outputs(scenes[:1], "map.tif", single=True) == [Path("map.tif")]
    assert name_outputs(scenes, "maps", single=False) == [Path("maps/a.tif"), Path("maps/b.tif")]
    assert name_outputs(scenes[:1], "maps", single=True) == [Path("maps/a.tif")]
    with pytest.raises(ValueError, match=r"output: found the file map\.tif; expected a folder"):
        name_outputs(scenes, "map.tif", single=False)
    with pytest.raises(ValueError, match=r"expected files of different names"):
        name_outputs([*scenes, tmp_path / "other" / "a.tif"], "maps", single=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["input"]),
        (["--input", "nowhere.tif"], ["nowhere.tif: found no such file; expected a GeoTIFF"]),
        (["--inputs", "{scene}"], ["unknown option --inputs", "one of --input, "]),
        (["--input", "{scene}", "--window", "33"], ["window: found 33 x 33", "32 x 32"]),
        (["--input", "{scene}", "--overlap", "0.7"], ["overlap: found 0.7"]),
        (["--input", "{scene}", "--batch_size", "0"], ["batch_size: found 0"]),
        (["--input", "{scene}", "--probabilities", "some"], ["probabilities", "some", "top"]),
        (["--input", "{scene}", "--precision", "8"], ["precision", "8", "bf16-mixed"]),
        (["--input", "{scene}", "--output", "{scene}"], ["scene.tif: found the scene itself"]),
        (["--input", "{scene}", "--wavelengths=[0.5,0.6]"], ["found 5 bands; expected 2"]),
        (["--input", "{scene}", "--checkpoint", "nowhere"], ["nowhere: got no manifest.json"]),
        (["--input", "{scene}", "--statistics_from", "nowhere"], ["nowhere: No such file"]),
        (["--input", "{cut}"], ["cut.tif", "GeoTIFF"]),
    ],
)  # fmt: skip
def test_wrong_input_ends_in_one_line_with_nothing_written(
    checkpoint: Path, tmp_path: Path, capsys: Any, options: list[str], words: list[str]
) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(5, 40, 40))
    cut = tmp_path / "cut.tif"
    cut.write_bytes(scene.read_bytes()[:9000])
    before = sorted(tmp_path.iterdir())
    base = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out" / "map.tif")]
    filled = [option.format(scene=scene, cut=cut) for option in options]
    assert main([*base, "--device", "cpu", *filled]) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if "statistics:" not in line]
    assert len(printed) == 1
    assert printed[0].startswith("spectralx.predict: error: ")
    for word in words:
        assert word in printed[0]
    left = [path for path in tmp_path.iterdir() if path not in before]
    assert not [path for one in left for path in one.rglob("*")]


def test_checkpoints_that_do_not_say_enough_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    scene = write_scene(tmp_path / "scene.tif", pixels(5, 40, 40))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for change, message in (
        ({"normalisation": None}, "without normalisation"),
        ({"model": "reconstruction"}, "of a reconstruction model; expected a segmentation"),
        ({"class_names": ["one"]}, "found 1 class names; expected 5"),
    ):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        (other / "manifest.json").write_text(json.dumps(manifest | change))
        (weights,) = checkpoint.glob("*.safetensors")
        (other / weights.name).write_bytes(weights.read_bytes())
        command = ["--checkpoint", str(other), "--input", str(scene), "--output", "map.tif"]
        assert main([*command, "--device", "cpu"]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1


def resized_model(folder: Path, model: Segmentation, **extra: Any) -> Path:
    """A checkpoint of `model`, trained on images that were resized."""
    return checkpoints.save(
        folder,
        model,
        wavelengths=list(WAVELENGTHS),
        class_names=CLASS_NAMES,
        normalisation={"kind": "image"},
        extra={"settings": {"data": {"crop": "resize"}}, **extra},
    )


def test_the_window_is_what_a_training_image_covered(
    tmp_path: Path, capsys: Any, predictor: Predictor
) -> None:
    """Training images of 66 x 61 pixels, seen as 32 x 32: a scene is seen in windows of 64 x 64."""
    path = resized_model(tmp_path / "checkpoint", predictor.model, tile_size=[66, 61])
    assert load_predictor(path).window == (64, 64)
    scene = write_scene(tmp_path / "scene.tif", pixels(5, 90, 110))
    command = ["--checkpoint", str(path), "--input", str(scene), "--progress", "false"]
    assert main([*command, "--output", str(tmp_path / "a.tif")]) == 0
    note = "64 x 64 pixels at a time resized to 32 x 32, as images of 66 x 61 were in training"
    assert note in capsys.readouterr().err
    labels = {}
    for window in ("64", "32"):
        output = tmp_path / f"{window}.tif"
        assert main([*command, "--output", str(output), "--window", window]) == 0
        assert capsys.readouterr().err == ""
        labels[window] = read_raster(output)
    assert np.array_equal(read_raster(tmp_path / "a.tif"), labels["64"])
    assert not np.array_equal(labels["64"], labels["32"])


def test_a_checkpoint_that_does_not_say_the_size_gets_a_note(
    tmp_path: Path, capsys: Any, predictor: Predictor
) -> None:
    path = resized_model(tmp_path / "checkpoint", predictor.model)
    scene = write_scene(tmp_path / "scene.tif", pixels(5, 40, 40))
    command = ["--checkpoint", str(path), "--input", str(scene), "--progress", "false"]
    assert main([*command, "--output", str(tmp_path / "a.tif")]) == 0
    assert "note: the model saw training images resized to 32 x 32" in capsys.readouterr().err
    for number, bad in enumerate(([0, 4], [10**9, 4], "64", [4], [4.0, 4])):
        other = resized_model(tmp_path / f"bad{number}", predictor.model, tile_size=bad)
        with pytest.raises(ValueError, match="tile_size: found"):
            load_predictor(other)
