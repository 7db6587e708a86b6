"""Maps of scenes of any size; a command: ``python -m spectralx.predict``.

    python -m spectralx.predict --checkpoint runs/.../best --input SCENE.tif --output MAP.tif
    python -m spectralx.predict --checkpoint runs/.../best --input 'scenes/*.tif' --output maps

Memory does not grow with the scene's height, and by a kilobyte or two a pixel with its width. A
run that ended in whatever way goes on with the same command and gives the same bytes; a map is
there under its name only when it is whole.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from spectralx.cli import InputError, run_command
from spectralx.data.raster import SUFFIXES, data_error, list_rasters
from spectralx.options import parse
from spectralx.prediction.job import Options, Probabilities, prepare
from spectralx.prediction.predictor import Precision, Predictor, load_predictor
from spectralx.prediction.run import Prediction, run

__all__ = ["Options", "Prediction", "Predictor", "load_predictor", "main", "predict_scene"]


def predict_scene(
    checkpoint: str | Path | Predictor,
    scene: str | Path,
    output: str | Path,
    options: Options | None = None,
    *,
    device: str | None = None,
    precision: Precision = "32-true",
    overwrite: bool = False,
    progress: bool = True,
) -> Prediction:
    """The map of a scene as a cloud-optimised GeoTIFF.

    Overlapping tiles go through the model; their logits are blended (`spectralx.prediction.blend`)
    and upsampled. All tiles are scaled alike: as in training, or, for a model trained with
    per-image scaling, by the extremes of the whole scene. The map has the scene's CRS, transform
    (or control points) and tags, a colour table, the class names (JSON in the band's tag
    CLASS_NAMES, and as GDAL's category names in ``<output>.aux.xml``) and overviews. 0 is
    "unlabelled" and marks pixels that are missing in all bands.

    Parameters
    ----------
    checkpoint : folder of a segmentation, or what `load_predictor` made of it, for many scenes.
    scene : GeoTIFF [C, H, W] of any size. Its bands are chosen by wavelength.
    output : GeoTIFF to write, uint8 [H, W] (uint16 above 256 classes). With
        ``options.probabilities`` there is ``<stem>_probability.tif`` beside it (uint8 times
        1/254, 255 missing), and ``<stem>.png`` unless ``options.quicklook`` is False.
    options : see `Options`.
    device, precision : as for `load_predictor`; of a predictor its own hold.
    overwrite : replace a map that is there. Without it one that this call would make again is left
        as it is, and any other is an error.
    progress : show progress bars on stderr.

    Returns
    -------
    What was written.

    Raises
    ------
    ValueError : checkpoint, scene, options or output that cannot be used; nothing is left behind.
    OSError : files that cannot be written; the same call goes on where this one ended.
    """
    if not isinstance(checkpoint, Predictor):
        checkpoint = load_predictor(checkpoint, device=device, precision=precision)
    job = prepare(checkpoint, scene, output, options or Options())
    return run(job, overwrite=overwrite, progress=progress)


def find_scenes(patterns: Sequence[str]) -> list[Path]:
    """Files, the GeoTIFFs of folders, and what glob patterns (``**`` too) match, each once.

    Raises
    ------
    DataError : one that gives no GeoTIFF.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found |= dict.fromkeys(list_rasters(path, "input"))
        elif path.is_file():
            found[path] = None
        else:
            matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
            matches = [match for match in matches if match.suffix.lower() in SUFFIXES]
            if not matches:
                raise data_error(pattern, "no such file", "a GeoTIFF, a folder or a pattern")
            found |= dict.fromkeys(matches)
    return list(found)


def name_outputs(scenes: Sequence[Path], output: str, *, single: bool) -> list[Path]:
    """The map of each scene: `output` itself, or files of the scenes' names in that folder.

    single : whether one file was asked for.

    Raises
    ------
    InputError : several scenes for one file, or of one name.
    """
    target = Path(output)
    is_file = target.suffix.lower() in SUFFIXES and not target.is_dir()
    if single and is_file:
        return [target]
    if is_file or target.is_file():
        raise InputError(f"output: found the file {target}; expected a folder for several maps")
    outputs = [target / f"{scene.stem}.tif" for scene in scenes]
    for place, path in enumerate(outputs):
        if path in outputs[:place]:
            first = scenes[outputs.index(path)]
            raise InputError(
                f"input: found {first} and {scenes[place]}; expected files of different names"
            )
    return outputs


def report(made: Prediction) -> str:
    """What was predicted, for the terminal."""
    size = f"{made.map}: {made.height} x {made.width} pixels"
    if not made.shares:
        return f"{size}, there already"
    largest = sorted(made.shares.items(), key=lambda item: -item[1])
    classes = ", ".join(f"{name} {100 * share:.1f} %" for name, share in largest[:5])
    more = f" and {len(largest) - 5} more" if len(largest) > 5 else ""
    return f"{size}, {made.tiles} tiles in {made.seconds:.1f} s; {classes}{more}"


def _note(predictor: Predictor, options: Options) -> str | None:
    """What to consider about the size of tiles."""
    if options.window is not None or predictor.crop in (None, "crop"):
        return None
    height, width = predictor.model.image_size
    if predictor.tile_size is None:
        return (
            f"note: the model saw training images resized to {height} x {width}; where they were "
            f"of another size, --window says which part of a scene it should see so"
        )
    if predictor.window == predictor.model.image_size:
        return None
    return (
        "note: the model sees {} x {} pixels at a time resized to {} x {}, as images of {} x {} "
        "were in training (--window says otherwise)"
    ).format(*predictor.window, height, width, *predictor.tile_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m spectralx.predict``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog="spectralx.predict", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=str, required=True, help="folder of a segmentation")
    parser.add_argument(
        "--input", type=str, nargs="+", required=True, help="GeoTIFFs, folders or glob patterns"
    )
    parser.add_argument(
        "--output", type=str, required=True, help="GeoTIFF to write; a folder for several"
    )
    parser.add_argument(
        "--window",
        type=int | None,
        help="side of what the model sees at once, in pixels of the scene; by default what a "
        "training image covered",
    )
    parser.add_argument("--overlap", type=float, default=0.25, help="share of a tile, 0 to 0.5")
    parser.add_argument(
        "--batch_size", type=int | None, help="tiles at a time; by default 8 on a GPU, 2 on a CPU"
    )
    parser.add_argument(
        "--probabilities",
        type=Probabilities,
        default="none",
        help="also write the probability of the map's class (top) or of all",
    )
    parser.add_argument("--quicklook", type=bool, default=True, help="also write a PNG")
    parser.add_argument(
        "--wavelengths", type=list[float] | None, help="of the scene's bands in micrometres"
    )
    parser.add_argument(
        "--adapt_bands",
        action="store_true",
        help="resample the tokenizer for a sensor that the model was not trained on",
    )
    parser.add_argument("--nodata", type=float | None, help="for files that do not state it")
    parser.add_argument(
        "--statistics_from",
        type=str | None,
        help="GeoTIFF whose extremes scale the bands, for parts of a mosaic; by default the scene",
    )
    parser.add_argument("--device", type=str | None, help="cpu or cuda; by default the fastest")
    parser.add_argument(
        "--precision", type=Precision, default="32-true", help="32-true, bf16-mixed or 16-mixed"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace maps")
    parser.add_argument("--progress", type=bool, default=True, help="show progress bars")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")

    def body() -> None:
        given = parse(parser, arguments)
        wavelengths = given["wavelengths"]
        options = Options(
            window=given["window"],
            overlap=given["overlap"],
            batch_size=given["batch_size"],
            probabilities=given["probabilities"],
            quicklook=given["quicklook"],
            wavelengths=None if wavelengths is None else tuple(wavelengths),
            adapt_bands=given["adapt_bands"],
            nodata=given["nodata"],
            statistics_from=given["statistics_from"],
        )
        scenes = find_scenes(given["input"])
        single = len(given["input"]) == 1 and Path(given["input"][0]).is_file()
        outputs = name_outputs(scenes, given["output"], single=single)
        predictor = load_predictor(
            given["checkpoint"], device=given["device"], precision=given["precision"]
        )
        note = _note(predictor, options)
        if note is not None:
            print(note, file=sys.stderr)
        # All headers first: what cannot be predicted is known before hours are spent.
        jobs = [
            prepare(predictor, scene, output, options)
            for scene, output in zip(scenes, outputs, strict=True)
        ]
        for job in jobs:
            made = run(job, overwrite=given["overwrite"], progress=given["progress"])
            print(report(made), flush=True)

    return run_command("spectralx.predict", body, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
