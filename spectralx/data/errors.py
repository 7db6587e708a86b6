"""The error of data that cannot be used."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """Data on disk that cannot be used: names the file, what was found and what is expected."""


def data_error(where: str | Path, found: str, expected: str) -> DataError:
    """The :class:`DataError` about `where`, its text folded onto one line."""
    return DataError(" ".join(f"{where}: found {found}; expected {expected}".split()))
