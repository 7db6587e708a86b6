"""SHA-256 of the files of a data set, in the format of ``sha256sum``: write, read, compare."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from spectralx.cli import write_text

from .errors import data_error, unreadable

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Checksums:
    """What each file's SHA-256 must be.

    Parameters
    ----------
    manifest : the file they come from, for errors.
    expected : hash by resolved path.
    """

    def __init__(self, manifest: Path, expected: Mapping[Path, str]) -> None:
        self.manifest = manifest
        self.expected = dict(expected)
        self._verified: set[tuple[Path, int, int]] = set()

    @classmethod
    def read(cls, manifest: Path) -> Checksums:
        """The hashes in a file of ``sha256sum``; its paths are below its own folder.

        Raises DataError where it is missing or a line is none.
        """
        if not manifest.is_file():
            raise data_error(manifest, "no such file", "a manifest of checksums")
        expected = {}
        lines = manifest.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            match = _LINE.fullmatch(line)
            if match is None:
                raise data_error(
                    f"{manifest} line {number}",
                    f"{line[:40]!r}",
                    "a SHA-256 and a path",
                )
            expected[resolved(manifest.parent / match[2])] = match[1]
        return cls(manifest, expected)

    def __contains__(self, path: Path) -> bool:
        return resolved(path) in self.expected

    def verify(self, path: Path) -> None:
        """Raise DataError unless `path` has the hash it should; read anew only when it changes."""
        path = resolved(path)
        if path not in self.expected:
            raise data_error(path, f"no checksum in {self.manifest}", "one for each file")
        state = path.stat()
        key = (path, state.st_size, state.st_mtime_ns)
        if key in self._verified:
            return
        found, wanted = sha256_of(path), self.expected[path]
        if found != wanted:
            raise unreadable(
                path, f"sha256 {found[:16]}...", f"{wanted[:16]}..., as in {self.manifest}"
            )
        self._verified.add(key)


def write_checksums(
    manifest: Path, files: Iterable[Path], each: Callable[[Path], object] = lambda path: None
) -> int:
    """Write the hashes of `files`, in one step; returns their number.

    Parameters
    ----------
    manifest : to write; paths are written relative to its folder.
    files : to hash.
    each : called with each file when it is done.
    """
    folder, lines = manifest.parent, []
    for path in sorted({*files}):
        name = os.path.relpath(path, folder)
        if not name.isprintable():
            raise data_error(repr(name), "a name that is not printable", "one that fits a line")
        lines.append(f"{sha256_of(path)}  {Path(name).as_posix()}\n")
        each(path)
    write_text(manifest, "".join(lines))
    return len(lines)


def resolved(path: Path) -> Path:
    """`path` from the root of the file system, links left alone."""
    return Path(os.path.abspath(path))
