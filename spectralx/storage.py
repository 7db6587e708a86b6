"""Files that are there whole or not at all, even after the power has gone."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's contents, or a folder's list of names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(partial: Path, target: Path) -> None:
    """Give the finished file `partial` its name `target`, replacing what bore it, durably.

    Contents reach the disk before the name does, and the name before this returns: a reader finds
    the old file or the new one, whole. Both are on one file system.
    """
    sync(partial)
    os.replace(partial, target)
    sync(target.parent)
