"""What all commands share: one line for every error, and an exit status that says whose it is.

Status 0 is success, 2 is input that cannot be used (options, configuration, data, checkpoints),
1 is a failure while running, 130 an interruption. ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

INPUT_STATUS = 2
RUN_STATUS = 1
INTERRUPT_STATUS = 130


class InputError(ValueError):
    """Input that cannot be used: names the file or key, what was found and what is expected."""


# Readers, argument checks and the file system raise these about what the user handed in ...
_INPUT_ERRORS = (ValueError, OSError)
# ... but for these, which speak of the run.
_RUN_ERRORS = (BrokenPipeError, ConnectionError, TimeoutError)


def one_line(error: BaseException) -> str:
    """The message of `error` on one line.

    An error that crossed a data-loading process carries that process's traceback in its message;
    only the last line, the original message, is kept.
    """
    text = str(error).strip()
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    elif "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def status_of(error: BaseException) -> int:
    """Exit status that `error` ends a command with."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPT_STATUS
    if isinstance(error, _INPUT_ERRORS) and not isinstance(error, _RUN_ERRORS):
        return INPUT_STATUS
    return RUN_STATUS


def run_command(name: str, body: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run `body` and turn its exceptions into one line on stderr and an exit status.

    Parameters
    ----------
    name : what the line starts with, e.g. ``spectralx.train``.
    body : the command; its return value is the exit status (None counts as 0).
    debug : let exceptions through, with their traceback.

    Returns
    -------
    The exit status, for ``sys.exit``.
    """
    try:
        return body() or 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        status = status_of(error)
        message = one_line(error)
        if status == INTERRUPT_STATUS and not str(error):
            message = "interrupted"
        elif status == RUN_STATUS and not isinstance(error, (RuntimeError, ArithmeticError)):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        print(f"{name}: error: {message}", file=sys.stderr)
        return status


def one_of(word: str, choices: Iterable[str]) -> str:
    """``one of a, b, c`` for the end of an error message, the choice closest to `word` first."""
    names = list(choices)
    close = get_close_matches(word, names, n=1)
    return "one of " + ", ".join(close + [name for name in names if name not in close])


@contextmanager
def write_folder(path: str | os.PathLike[str], marker: str) -> Iterator[Path]:
    """A folder to fill that takes the place of `path` when the block ends well, and else is gone.

    Parameters
    ----------
    path : where it goes. What is there is replaced if it is empty or holds `marker`.
    marker : file that every such folder holds.

    Raises
    ------
    InputError : `path` holds something else; nothing is written.
    """
    target = Path(path)
    there = target.exists() or target.is_symlink()
    if there and not target.is_dir():
        raise InputError(f"{target}: found a file; expected a folder or nothing")
    if there and any(target.iterdir()) and not (target / marker).is_file():
        raise InputError(f"{target}: found other files; expected one with {marker}, or nothing")
    partial, before = (target.with_name(f".{target.name}.{end}") for end in ("partial", "before"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if there:
            shutil.rmtree(before, ignore_errors=True)
            os.replace(target, before)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, its folder included, in one step: all of it or nothing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def refresh_seconds() -> float:
    """Least seconds between two updates of a progress bar; few where stderr is no terminal."""
    return 0.1 if sys.stderr.isatty() else 20.0
