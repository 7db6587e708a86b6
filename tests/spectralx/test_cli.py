from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectralx import evaluate, train
from spectralx.cli import InputError, one_line, one_of, run_command, write_text
from spectralx.data import read_raster, write_raster
from spectralx.fit import fit
from tests.spectralx.tiny import tiny_config, tiny_settings

Break = Callable[[Path], None]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("key: found 1; expected 2"), 2, "tool: error: key: found 1; expected 2"),
        (FileNotFoundError(2, "No such file", "a.tif"), 2, "tool: error: a.tif: No such file"),
        (ValueError("two\nlines"), 2, "tool: error: two lines"),
        (RuntimeError("out of memory"), 1, "tool: error: out of memory"),
        (KeyError("name"), 1, "tool: error: KeyError: 'name' (--debug shows where)"),
        (KeyboardInterrupt(), 130, "tool: error: interrupted"),
        (BrokenPipeError(), 1, "tool: error: BrokenPipeError: BrokenPipeError (--debug shows"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, status: int, message: str, capsys: Any
) -> None:
    def body() -> None:
        raise error

    assert run_command("tool", body) == status
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1
    with pytest.raises(type(error)):
        run_command("tool", body, debug=True)


def test_success_is_zero_and_a_body_may_choose() -> None:
    assert run_command("tool", lambda: None) == 0
    assert run_command("tool", lambda: 3) == 3


def test_errors_from_data_loading_processes_lose_their_traceback() -> None:
    error = ValueError(
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 1\nspectralx.data.raster.DataError: a.tif: found 3 bands'
    )
    assert one_line(error) == "a.tif: found 3 bands"


def test_the_closest_choice_comes_first() -> None:
    assert one_of("rot", ["task", "root"]) == "one of root, task"


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "new" / "a.txt", "\ud800")
    assert (tmp_path / "new" / "a.txt").read_text() == "first"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def make_folder(root: Path) -> None:
    """A folder of tiles: 5 bands, 3 classes, splits in CSV files."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    splits = {"train": "abcd", "validation": "e", "test": "f"}
    for split, tiles in splits.items():
        for tile in tiles:
            image = rng.integers(100, 3000, (5, 32, 32)).astype("uint16")
            bands = [f"{0.45 + 0.1 * band:.2f} um" for band in range(5)]
            write_raster(root / "images" / f"{tile}.tif", image, descriptions=bands)
            label = rng.integers(0, 4, (32, 32)).astype("uint8")
            write_raster(root / "labels" / f"{tile}.tif", label)
        rows = [f"images/{tile}.tif,labels/{tile}.tif" for tile in tiles]
        (root / f"{split}.csv").write_text("image,mask\n" + "\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder") / "tiles"
    make_folder(root)
    return root


def empty_the_test(root: Path) -> None:
    (root / "test.csv").write_text("image,mask\n")


def truncate(root: Path) -> None:
    path = root / "images" / "c.tif"
    path.write_bytes(path.read_bytes()[:4000])


def drop_a_band(root: Path) -> None:
    path = root / "images" / "b.tif"
    write_raster(path, read_raster(path)[:4])


def widen_a_label(root: Path) -> None:
    path = root / "labels" / "d.tif"
    label = read_raster(path)
    label[0, 0, 0] = 9
    write_raster(path, label)


WRONG_DATA: list[tuple[Break, list[str], list[str]]] = [
    (shutil.rmtree, [], ["tiles: found no such folder; expected"]),
    (empty_the_test, [], ["test.csv", "no rows"]),
    (lambda root: (root / "labels" / "b.tif").unlink(), [], ["labels/b.tif", "train.csv line 3"]),
    (lambda root: None, ["--data.wavelengths=[0.4,0.5,0.6]"], ["5 bands", "3"]),
    (drop_a_band, [], ["images/b.tif", "4 bands", "expected 5"]),
    (widen_a_label, ["--data.class_names=[x,y,z]"], ["labels/d.tif", "label 9", "classes 0 to 3"]),
    (truncate, [], ["images/c.tif", "GeoTIFF"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "options", "words"), WRONG_DATA)
@pytest.mark.parametrize("cache", ["true", "false"])
def test_wrong_data_ends_in_one_line_with_nothing_written(
    folder: Path, tmp_path: Path, capsys: Any, damage: Break, options: list[str], words: list[str],
    cache: str,
) -> None:  # fmt: skip
    root = tmp_path / "tiles"
    shutil.copytree(folder, root)
    damage(root)
    config, out = tiny_config(tmp_path), tmp_path / "out"
    base = ["--config", str(config), "--data.task=folder", f"--data.root={root}", f"--out={out}"]
    assert train.main(["both", *base, *options, f"--data.cache={cache}"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith("spectralx.train: error: ")
    for word in words:
        assert word in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["stage3"], ["stage", "stage3", "stage1"]),
        (["stage1", "--dta.root=x"], ["unknown option --dta.root", "--data.root"]),
        (["stage1", "--data.task=WS-DW"], ["task", "'WS-DW'", "WS-WD"]),
        (["stage2"], ["stage2.init_from", "no checkpoint"]),
        (["stage2", "--stage2.init_from={tmp}"], ["manifest.json", "checkpoint folder"]),
        (["stage1", "--model.family=dinov3"], ["model.family", "dinov3", "satmae++"]),
        (["stage1", "--data.image_size=40"], ["image_size", "40", "16"]),
    ],
)
def test_wrong_options_end_in_one_line_with_nothing_written(
    tiny_scenes: Path, tmp_path: Path, capsys: Any, options: list[str], words: list[str]
) -> None:
    config, out = tiny_config(tmp_path), tmp_path / "out"
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    base = ["--config", str(config), f"--data.root={tiny_scenes}", f"--out={out}"]
    assert train.main([options[0], *base, *options[1:]]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    for word in words:
        assert word in printed
    assert not out.exists()


def test_checkpoints_of_other_sizes_and_data_are_refused(
    folder: Path, tiny_scenes: Path, tmp_path: Path, capsys: Any
) -> None:
    settings = tiny_settings(
        tiny_scenes, tmp_path, "--stage1.run.steps=1", "--stage1.run.pictures=0"
    )
    best = fit("stage1", settings).best
    capsys.readouterr()
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    base = ["--config", str(config), f"--data.root={tiny_scenes}", f"--out={out}"]
    wider = [f"--stage2.init_from={best}", "--model.embed_dim=32"]
    assert train.main(["stage2", *base, *wider]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "cls_token" in printed
    assert "[1, 1, 16]" in printed
    assert not out.exists()

    other = ["--checkpoint", str(best), "--root", str(folder), "--task", "folder"]
    assert evaluate.main(other) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "5 bands; expected 32" in printed


def test_the_command_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spectralx.train", "stage1", "--config", "quickstart"]
    run = subprocess.run(
        [*command, f"--data.root={tmp_path / 'nowhere'}", f"--out={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("spectralx.train: error: ")
    assert "Traceback" not in run.stderr
    assert "nowhere: found no such folder" in run.stderr
