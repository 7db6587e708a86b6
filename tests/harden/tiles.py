"""Row 9: tiles that are cut, changed by a bit, no TIFF at all, or of a size that is a lie.

Sample 0 is a virtual raster named .tif, sample 1 a file that declares 960 GB; then every second one
is truncated anywhere, and every second one has one bit flipped anywhere and a manifest beside it.
Each must end in a `DataError` of one line with the file's name. The same file among the images of a
data set ends it too; where skipping is asked for (`data.skip_damaged`), it alone is left out, named
and counted.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rasterio

from spectralx.data import DataError, Pair, TileDataset, raster_info, read_raster, write_raster
from spectralx.data.damage import SkipDamaged, counts
from spectralx.data.manifest import write_manifest
from tests.harden.checkpoints import peak, reset_peak
from tests.harden.record import Outcome

KINDS = (
    (None, "uint16", 3), ("deflate", "uint16", 13), ("lzw", "float32", 2), (None, "int16", 1),
)  # fmt: skip
ROWS, COLUMNS = 33, 41
BOMB_SIDE, BOMB_BANDS = 400_000, 3  # uint16: 960 GB
ALLOWANCE = 200 << 20


def sound_tiles(folder: Path) -> list[Path]:
    """Whole files of several kinds."""
    generator = np.random.default_rng(0)
    found = []
    for place, (compress, dtype, bands) in enumerate(KINDS):
        path = folder / f"{place}.tif"
        write_raster(
            path,
            generator.uniform(0, 3000, (bands, ROWS, COLUMNS)).astype(dtype),
            compress=compress,
            crs="EPSG:32650",
            nodata=0,
            descriptions=[f"{0.4 + 0.1 * band} um" for band in range(bands)],
        )
        found.append(path)
    return found


def virtual(folder: Path, real: Path) -> Path:
    """A VRT that points at another file, under a .tif name."""
    path = folder / "virtual.tif"
    path.write_text(
        f'<VRTDataset rasterXSize="41" rasterYSize="33"><VRTRasterBand dataType="UInt16" band="1">'
        f"<SimpleSource><SourceFilename>{real}</SourceFilename></SimpleSource>"
        "</VRTRasterBand></VRTDataset>"
    )
    return path


def bomb(folder: Path) -> Path:
    """A few kilobytes that declare 960 GB of pixels."""
    path = folder / "bomb.tif"
    profile = {
        "driver": "GTiff", "width": BOMB_SIDE, "height": BOMB_SIDE, "count": BOMB_BANDS,
        "dtype": "uint16", "tiled": True, "blockxsize": 16384, "blockysize": 16384,
        "SPARSE_OK": "TRUE", "BIGTIFF": "YES",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile):
        pass
    return path


def damaged(number: int, folder: Path, sound: list[Path]) -> tuple[Path, Path]:
    """The file of a sample, and the whole one it was made from."""
    if number == 0:
        return virtual(folder, sound[0]), sound[0]
    if number == 1:
        return bomb(folder), sound[0]
    choose = random.Random(number)
    source = choose.choice(sound)
    content = bytearray(source.read_bytes())
    if number % 2:
        path = source  # in its place, so that the manifest speaks of it
        place = choose.randrange(len(content))
        content[place] ^= 1 << choose.randrange(8)
    else:
        path = folder / "cut.tif"
        del content[choose.randrange(len(content)) :]
    path.write_bytes(content)
    return path, source


def data_set(folder: Path, path: Path, whole: bytes) -> TileDataset:
    """The image `path`, and one whose file is `whole`, with their labels."""
    label, image = folder / "label.tif", folder / "whole.tif"
    image.write_bytes(whole)
    write_raster(label, np.ones((ROWS, COLUMNS), dtype=np.uint8))
    wavelengths = [0.4 + 0.1 * band for band in range(raster_info(image).bands)]
    return TileDataset(
        [Pair(path, label), Pair(image, label)],
        name="tiles",
        wavelengths=wavelengths,
        class_names=["unlabelled", "land"],
    )


def skipping_failure(dataset: TileDataset, path: Path) -> str | None:
    """What is wrong with how `path` is skipped; None for nothing."""
    try:
        for index in range(len(dataset)):
            dataset.read(index)
    except DataError:
        pass
    else:
        return "read in a data set"
    skip = SkipDamaged()
    left = skip("train", dataset)
    assert isinstance(left, TileDataset)
    if [pair.image for pair in left.pairs] != [dataset.pairs[1].image]:
        return f"{len(left)} images left of 2, where it is to be skipped"
    if list(skip.skipped["train"]) != [str(path)] or counts(skip.skipped) != {"train": 1}:
        return f"skipped as {skip.skipped}"
    if str(path) not in skip.skipped["train"][str(path)]:
        return "skipped without its name"
    left.read(0)
    return None


def failure_of(number: int, folder: Path, sound: list[Path]) -> str | None:
    """Why a damaged tile was not found, or how its error is wrong."""
    whole = {path: path.read_bytes() for path in sound}
    path, source = damaged(number, folder, sound)
    kind = (
        "virtual" if number == 0 else "bomb" if number == 1 else "flipped" if number % 2 else "cut"
    )
    where = f"sample {number}: {kind} {path.name} of {path.stat().st_size} bytes"
    reset_peak()
    before = peak()
    try:
        read_raster(path)
    except DataError as error:
        if "\n" in str(error) or str(path) not in str(error):
            return f"{where}: an error that is not one line with the file: {str(error)[:200]!r}"
        if peak() - before > ALLOWANCE:
            return f"{where}: {(peak() - before) >> 20} MB"
        failure = skipping_failure(data_set(folder, path, whole[source]), path)
        return f"{where}: {failure}" if failure else None
    except Exception as error:
        return f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        return f"{where}: read as if it were whole"
    finally:
        for each, content in whole.items():
            each.write_bytes(content)
    return None


def run(numbers: Iterable[int]) -> Outcome:
    outcome = Outcome(figures={"truncated": 0, "flipped": 0, "skipped where asked": 0})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "set").mkdir()
        sound = sound_tiles(folder / "set")
        write_manifest(folder / "set")
        for path in sound:
            read_raster(path)
        for number in numbers:
            failure = failure_of(number, folder, sound)
            outcome.failures += [failure] if failure else []
            outcome.checked += 1
            outcome.figures["skipped where asked"] += not failure
            if number > 1:
                outcome.figures["flipped" if number % 2 else "truncated"] += 1
    return outcome
