"""The errors of data that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class DataError(ValueError):
    """Data on disk that cannot be used: names the file, what was found and what is expected."""


class UnreadableError(DataError):
    """A file that is there and cannot be read: cut, damaged, no GeoTIFF, not what is listed.

    Attributes
    ----------
    path : the file.
    """

    # A data-loading process hands errors on by their one argument.
    path: Path = Path()


def data_error(where: str | Path, found: str, expected: str) -> DataError:
    """The :class:`DataError` about `where`, its text folded onto one line."""
    return DataError(_text(where, found, expected))


def unreadable(path: Path, found: str, expected: str) -> UnreadableError:
    """The :class:`UnreadableError` about the file `path`, its text folded onto one line."""
    error = UnreadableError(_text(path, found, expected))
    error.path = path
    return error


def first_readable(read: Callable[[Path], T], paths: Iterable[Path]) -> T:
    """What `read` gives of the first of `paths`, at least one, that can be read.

    Those before it are left to whoever reads their samples.

    Raises
    ------
    UnreadableError : about the first, where none can be read.
    """
    failed: UnreadableError | None = None
    for path in paths:
        try:
            return read(path)
        except UnreadableError as error:
            failed = failed or error
    assert failed is not None
    raise failed


def _text(where: str | Path, found: str, expected: str) -> str:
    return " ".join(f"{where}: found {found}; expected {expected}".split())
