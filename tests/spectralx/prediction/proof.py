"""Longer proofs of prediction, as commands.

    python -m tests.spectralx.prediction.proof quarters [--side 4000] [--window 128]
    python -m tests.spectralx.prediction.proof kills [--side 1500] [--count 20]

``quarters`` predicts a scene whole and in quarters and counts pixels that differ farther than a
tile from the cuts. ``kills`` runs the command in processes that are killed (SIGKILL) after random
times until one gets to its end, and compares the bytes with those of a run that was left alone.
Status 1 where they differ. `memory` in this folder measures memory.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from spectralx.data import read_raster
from spectralx.predict import Options, load_predictor, predict_scene
from tests.spectralx.prediction.scenes import FIXED, pixels, save_model, write_scene

SIDE = 128  # of a tile


def quarters(folder: Path, side: int, window: int) -> bool:
    """Whether the maps of quarters are those of the whole."""
    checkpoint = save_model(folder / "checkpoint", FIXED, image_size=SIDE)
    predictor = load_predictor(checkpoint, device="cpu")
    values = pixels(5, side, side)
    whole = write_scene(folder / "whole.tif", values)
    options = Options(window=window, quicklook=False)
    expected = read_raster(predict_scene(predictor, whole, folder / "map.tif", options).map)[0]
    half = side // 2 + 3
    reach = window + window // 32  # a tile, and a cell that upsampling looks at
    different = compared = 0
    for row in (0, 1):
        for column in (0, 1):
            area = tuple(slice(half, None) if one else slice(0, half) for one in (row, column))
            part = write_scene(
                folder / f"{row}{column}.tif",
                values[(slice(None), *area)],
                corner=(row * half, column * half),
            )
            made = predict_scene(predictor, part, folder / f"map-{row}{column}.tif", options)
            inner = tuple(slice(reach, None) if one else slice(0, -reach) for one in (row, column))
            same = read_raster(made.map)[0][inner] == expected[area][inner]
            different += int((~same).sum())
            compared += same.size
    print(f"{different} of {compared} pixels differ ({side * side} in the scene)")
    return different == 0


def kills(folder: Path, side: int, count: int, seed: int) -> bool:
    """Whether a run that was killed `count` times makes the files of one that was not."""
    checkpoint = save_model(folder / "checkpoint", image_size=SIDE)
    scene = write_scene(folder / "scene.tif", pixels(5, side, side), nodata=1)
    command = [sys.executable, "-m", "spectralx.predict", "--checkpoint", str(checkpoint)]
    command += ["--input", str(scene), "--device", "cpu", "--probabilities", "top"]
    begin = time.perf_counter()
    subprocess.run([*command, "--output", str(folder / "whole" / "map.tif")], check=True)
    alone = time.perf_counter() - begin
    draw = random.Random(seed)
    killed = 0
    while killed < count:
        child = subprocess.Popen([*command, "--output", str(folder / "killed" / "map.tif")])
        try:
            child.wait(draw.uniform(0.3, 1.0) * alone)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            killed += 1
            continue
        if not _same(folder):
            return False
        for path in (folder / "killed").iterdir():  # it got to its end: once more from the start
            path.unlink()
    subprocess.run([*command, "--output", str(folder / "killed" / "map.tif")], check=True)
    print(f"{killed} kills at random times of a run of {alone:.1f} s")
    return _same(folder)


def _same(folder: Path) -> bool:
    """Whether both folders have the same files, and nothing else."""
    whole, killed = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        for name in ("whole", "killed")
    )
    if whole != killed:
        print(f"files differ: {sorted(whole)} and {sorted(killed)}", file=sys.stderr)
    return whole == killed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.spectralx.prediction.proof")
    parser.add_argument("proof", choices=("quarters", "kills"))
    parser.add_argument("--side", type=int, help="of the scene")
    parser.add_argument("--window", type=int, default=SIDE, help="side of a tile in the scene")
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        if options.proof == "quarters":
            same = quarters(Path(name), options.side or 4000, options.window)
        else:
            same = kills(Path(name), options.side or 1500, options.count, options.seed)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
