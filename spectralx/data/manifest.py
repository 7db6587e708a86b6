"""Checksums of the tiles of a folder: ``python -m spectralx.data.manifest ROOT``.

Writes ``sha256sums.txt`` at the root, in the format of ``sha256sum``, for every tile below it.
Where a folder or one above it holds such a file, every tile listed there is held to its checksum
when it is first read, so that a changed byte is an error and never a training sample. ``--check``
goes through all of them at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from spectralx.cli import run_command

from .checksums import Checksums, write_checksums
from .errors import DataError, data_error

MANIFEST = "sha256sums.txt"
TILES = (".tif", ".tiff", ".mat")


def tiles_below(root: Path) -> list[Path]:
    """Every GeoTIFF and MATLAB file below `root`, sorted."""
    return sorted(
        path for path in root.rglob("*") if path.suffix.lower() in TILES and path.is_file()
    )


def write_manifest(root: str | Path) -> Path:
    """Write the checksums of all tiles below `root`; the file's path.

    Raises DataError where there is no tile.
    """
    root = Path(root)
    tiles = tiles_below(root)
    if not tiles:
        raise data_error(root, "no tile", f"{', '.join(TILES)} below it")
    with tqdm(total=len(tiles), desc="checksums", unit="file") as bar:
        write_checksums(root / MANIFEST, tiles, lambda path: bar.update())
    listed.cache_clear()
    return root / MANIFEST


@lru_cache(maxsize=4096)
def listed(folder: Path) -> Checksums | None:
    """The checksums of the nearest folder from `folder` up that holds a manifest.

    Raises DataError for a line that is not a checksum and a name.
    """
    for root in (folder, *folder.parents):
        if (root / MANIFEST).is_file():
            return Checksums.read(root / MANIFEST)
    return None


def check_listed(path: Path) -> None:
    """Raise DataError where a manifest lists `path` with another checksum than it has."""
    found = listed(Path(os.path.abspath(path)).parent)
    if found is not None and path in found:
        found.verify(path)


def check(root: str | Path) -> list[str]:
    """A line for each tile of the manifest at `root` that is missing or differs."""
    manifest = Path(os.path.abspath(root)) / MANIFEST
    if not manifest.is_file():
        raise data_error(root, f"no {MANIFEST}", "one, from spectralx.data.manifest")
    checksums, lines = Checksums.read(manifest), []
    for path in tqdm(checksums.expected, desc="checksums", unit="file"):
        try:
            if not path.is_file():
                raise data_error(path, "no such file", "the one that was listed")
            checksums.verify(path)
        except DataError as error:
            lines.append(str(error))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m spectralx.data.manifest``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def body() -> int:
        parser = argparse.ArgumentParser(prog="spectralx.data.manifest", description=__doc__)
        parser.add_argument("root", help="folder of the data set")
        parser.add_argument("--check", action="store_true", help="compare, write nothing")
        parser.add_argument("--debug", action="store_true", help="show tracebacks")
        given = parser.parse_args(arguments)
        if not given.check:
            print(write_manifest(given.root))
            return 0
        lines = check(given.root)
        print("\n".join([*lines, f"{len(lines)} files differ"]))
        return 1 if lines else 0

    return run_command("spectralx.data.manifest", body, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
