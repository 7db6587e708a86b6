"""Checksums of a data set: ``python -m spectralx.data.manifest ROOT``.

Writes ``sha256sums.txt`` at the root, in the format of ``sha256sum``, for every tile below it.
Where a folder or one above it holds such a file, every tile listed there is held to its checksum
each time it is read, so that a changed byte is an error and never a training sample. ``--check``
goes through all of them at once. A process reads the list of a folder once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from spectralx.cli import run_command, write_text

MANIFEST = "sha256sums.txt"
TILES = (".tif", ".tiff", ".mat")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tiles_below(root: Path) -> list[Path]:
    """Every GeoTIFF and MATLAB file below `root`, sorted."""
    return sorted(
        path for path in root.rglob("*") if path.suffix.lower() in TILES and path.is_file()
    )


def write_manifest(root: str | Path) -> Path:
    """Write the checksums of all tiles below `root`; the file's path.

    Raises ValueError where there is no tile.
    """
    root = Path(root)
    tiles = tiles_below(root)
    if not tiles:
        raise ValueError(f"{root}: found no tile; expected {', '.join(TILES)} below it")
    lines = [
        f"{sha256_of(tile)}  {tile.relative_to(root).as_posix()}"
        for tile in tqdm(tiles, desc="checksums")
    ]
    write_text(root / MANIFEST, "\n".join(lines) + "\n")
    listed.cache_clear()
    return root / MANIFEST


@lru_cache(maxsize=4096)
def listed(folder: Path) -> tuple[Path, Mapping[str, str]] | None:
    """The nearest folder from `folder` up that holds a manifest, and its checksums by name.

    Raises ValueError for a line that is not a checksum and a name.
    """
    for root in (folder, *folder.parents):
        path = root / MANIFEST
        if not path.is_file():
            continue
        sums: dict[str, str] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            digest, _, name = line.partition("  ")
            if len(digest) != 64 or not name:
                raise ValueError(f"{path} line {number}: found {line[:80]!r}; expected a checksum")
            sums[name] = digest
        return root, sums
    return None


def damage(path: str | Path) -> str | None:
    """How `path` differs from its manifest in one line; None where it does not, or has none."""
    absolute = Path(os.path.abspath(path))
    found = listed(absolute.parent)
    if found is None:
        return None
    root, sums = found
    expected = sums.get(absolute.relative_to(root).as_posix())
    if expected is None:
        return None
    digest = sha256_of(absolute)
    if digest == expected:
        return None
    return f"sha256 {digest[:16]}..., not the {expected[:16]}... of {root / MANIFEST}"


def check(root: str | Path) -> list[str]:
    """A line for each tile of the manifest at `root` that is missing or differs."""
    found = listed(Path(os.path.abspath(root)))
    if found is None or found[0] != Path(os.path.abspath(root)):
        raise ValueError(f"{root}: found no {MANIFEST}; expected one, from spectralx.data.manifest")
    lines = []
    for name in tqdm(found[1], desc="checksums"):
        path = found[0] / name
        wrong = damage(path) if path.is_file() else "no such file"
        lines += [f"{path}: {wrong}"] if wrong else []
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
