from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from spectralx.predict import Options, Predictor, main, predict_scene
from spectralx.prediction import output, run, store
from spectralx.prediction.store import Store
from tests.spectralx.prediction.scenes import pixels, write_scene

OPTIONS = Options(probabilities="top", batch_size=2, quicklook=False)
ROWS = 6  # of tiles


class Whole(NamedTuple):
    """A scene, and the files of its uninterrupted prediction by name."""

    scene: Path
    files: dict[str, bytes]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("restart")
    values = pixels(5, 125, 50)
    values[:, 60:90, 10:40] = 0
    scene = write_scene(folder / "scene.tif", values, nodata=0, corner=(7, 3))
    predict_scene(predictor, scene, folder / "whole" / "map.tif", OPTIONS, progress=False)
    return Whole(scene, files_of(folder / "whole"))


def stop_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int,
               *, before: bool = False) -> None:  # fmt: skip
    """The call number `calls` of a function ends the run, with or without having done its work."""
    inner: Callable[..., Any] = getattr(owner, name)
    count = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls and before:
            raise KeyboardInterrupt
        made = inner(*arguments, **keywords)
        if count == calls:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(owner, name, counted)


STOPS = [
    *[(Store, "finish", calls, False) for calls in (1, 3, ROWS + 1)],
    (Store, "write", 4, False),
    (Store, "write", 3, True),
    (output, "write_cog", 1, False),
    (output, "write_cog", 2, True),
    (os, "replace", 5, True),
    (run, "discard", 1, True),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "calls", "before"), STOPS)
def test_an_ended_run_goes_on_and_gives_the_same_bytes(
    predictor: Predictor, whole: Whole, tmp_path: Path, owner: Any, name: str, calls: int,
    before: bool,
) -> None:  # fmt: skip
    target = tmp_path / "map.tif"

    def predict() -> int:
        return predict_scene(predictor, whole.scene, target, OPTIONS, progress=False).tiles

    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, owner, name, calls, before=before)
        with pytest.raises(KeyboardInterrupt):
            predict()
    if name != "discard":
        assert not target.exists()
    tiles = predict()
    assert files_of(tmp_path) == whole.files
    if name in ("write_cog", "discard"):
        assert tiles == 0  # every row was there


def test_the_picture_is_the_same_too(predictor: Predictor, whole: Whole, tmp_path: Path) -> None:
    options = Options(batch_size=2)
    predict_scene(predictor, whole.scene, tmp_path / "a" / "map.tif", options, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, run.quicklook, "draw", 1)
        with pytest.raises(KeyboardInterrupt):
            predict_scene(
                predictor, whole.scene, tmp_path / "b" / "map.tif", options, progress=False
            )
    made = predict_scene(
        predictor, whole.scene, tmp_path / "b" / "map.tif", options, progress=False
    )
    assert made.tiles == 0
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a")


def test_statistics_are_not_measured_again(
    predictor: Predictor, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, Store, "write", 1)
        with pytest.raises(KeyboardInterrupt):
            predict_scene(predictor, whole.scene, tmp_path / "map.tif", OPTIONS, progress=False)
    monkeypatch.setattr(run, "scene_scaling", lambda *unused, **options: pytest.fail("again"))
    predict_scene(predictor, whole.scene, tmp_path / "map.tif", OPTIONS, progress=False)
    assert files_of(tmp_path) == whole.files


def test_other_options_start_anew(predictor: Predictor, whole: Whole, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, Store, "finish", 4)
        other = Options(probabilities="all", overlap=0.5)
        with pytest.raises(KeyboardInterrupt):
            predict_scene(predictor, whole.scene, tmp_path / "map.tif", other, progress=False)
    predict_scene(predictor, whole.scene, tmp_path / "map.tif", OPTIONS, progress=False)
    assert files_of(tmp_path) == whole.files


KILLED = """
import os, signal, sys
from spectralx.predict import main
from spectralx.prediction.store import Store

finish = Store.finish

def killed(self, done):
    finish(self, done)
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Store.finish = killed
main(sys.argv[1:])
"""


def test_a_killed_process_goes_on_with_the_same_command(
    checkpoint: Path, whole: Whole, tmp_path: Path
) -> None:
    target = tmp_path / "map.tif"
    command = ["--checkpoint", str(checkpoint), "--input", str(whole.scene), "--device", "cpu"]
    command += ["--output", str(target), "--probabilities", "top", "--batch_size", "2"]
    command += ["--quicklook", "false"]
    child = subprocess.run(
        [sys.executable, "-c", KILLED, *command], capture_output=True, check=False, timeout=600
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".map.tif.partial"]
    assert json.loads((tmp_path / ".map.tif.partial" / "plan.json").read_text())["done"] == 3
    assert main(command) == 0
    assert files_of(tmp_path) == whole.files


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    predictor: Predictor, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "map.tif"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))  # of the 6250 bytes of classes
    try:
        with pytest.raises(OSError, match="File too large"):
            predict_scene(predictor, whole.scene, target, OPTIONS, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not target.exists()
    predict_scene(predictor, whole.scene, target, OPTIONS, progress=False)
    assert files_of(tmp_path) == whole.files

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"b\.tif: found 0\.0 GiB free; expected"):
        predict_scene(predictor, whole.scene, tmp_path / "b.tif", OPTIONS, progress=False)
    assert files_of(tmp_path) == whole.files


def test_damage_leaves_nothing_behind(predictor: Predictor, whole: Whole, tmp_path: Path) -> None:
    scene = tmp_path / "scene.tif"
    write_scene(scene, pixels(5, 60, 70), compress="deflate")
    content = bytearray(scene.read_bytes())
    third = len(content) // 3
    content[third : 2 * third] = np.random.default_rng(0).bytes(third)
    scene.write_bytes(content)
    with pytest.raises(ValueError, match=r"scene\.tif: found pixels that cannot be read"):
        predict_scene(predictor, scene, tmp_path / "map.tif", OPTIONS, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_two_processes_do_not_write_one_map(tmp_path: Path) -> None:
    target = tmp_path / "map.tif"
    with (
        store.open_store(target, "a", {}),
        pytest.raises(ValueError, match=r"map\.tif: found another process that writes it"),
        store.open_store(target, "a", {}),
    ):
        pass
