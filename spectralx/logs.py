"""Figures of a run over its steps: CSV, TensorBoard, and Weights & Biases where it is installed.

A run that goes on from a saved state first takes back what was logged after it, so each file holds
every figure once. Figures of time and memory, which no two runs share, have a file of their own.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from spectralx.cli import InputError, one_line
from spectralx.resume import SaveError
from spectralx.storage import sync

METRICS = "metrics.csv"
SPEED = "speed.csv"
SPEED_COLUMNS = ("images_per_second", "data_wait_share", "peak_memory_mib")
SPEED_PREFIX = "speed/"


class CsvLog(Logger):
    """One row each time something is logged, on disk at once.

    Parameters
    ----------
    path : the file; begun anew where it is not there.
    columns : beside ``step``; what has other names is an error, unless `prefix` leaves it out.
    prefix : only names that begin so are written, without it; "" takes all that have no "speed/".
    """

    def __init__(self, path: Path, columns: Sequence[str], prefix: str = "") -> None:
        super().__init__()
        self.path = path
        self.columns = ("step", *columns)
        self.prefix = prefix

    @property
    def name(self) -> str:
        """Of the file."""
        return self.path.name

    @property
    def version(self) -> str:
        """Empty: there is one file."""
        return ""

    def log_hyperparams(self, *unused: Any, **options: Any) -> None:
        """Settings have a file of their own."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row."""
        found = {
            name.removeprefix(self.prefix): value
            for name, value in metrics.items()
            if name != "epoch" and name.startswith(self.prefix or SPEED_PREFIX) == bool(self.prefix)
        }
        if not found:
            return
        row = io.StringIO()
        writer = csv.DictWriter(row, self.columns, lineterminator="\n")
        try:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                writer.writeheader()
            writer.writerow({"step": step, **found})
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(row.getvalue())
        except OSError as error:
            raise SaveError(f"{self.path}: could not be written: {one_line(error)}") from error


def open_logs(
    folder: Path, columns: Sequence[str], wandb: str | None, settings: Mapping[str, Any]
) -> list[Logger]:
    """What a run logs to. `wandb` is the name of a project, or None.

    Raises
    ------
    InputError : Weights & Biases is asked for and not installed.
    """
    logs: list[Logger] = [
        CsvLog(folder / METRICS, columns),
        CsvLog(folder / SPEED, SPEED_COLUMNS, SPEED_PREFIX),
        TensorBoardLogger(folder, name="tensorboard", version=0),
    ]
    if wandb is not None:
        # The run keeps its name, so that going on continues the same curves.
        log = WandbLogger(
            project=wandb, name=str(folder), id=_wandb_name(folder), save_dir=folder, resume="allow"
        )
        log.log_hyperparams(dict(settings))
        logs.append(log)
    return logs


def close_logs(logs: Sequence[Logger]) -> None:
    """End the run of Weights & Biases: a later stage in this process begins one of its own."""
    for log in logs:
        if isinstance(log, WandbLogger):
            log.experiment.finish()


def check_wandb(wandb: str | None) -> None:
    """Refuse `wandb`, the name of a project, where the library is not installed."""
    if wandb is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"trainer.wandb: found {wandb}, but no package wandb; expected null, or "
            "`pip install wandb`"
        )


def _wandb_name(folder: Path) -> str:
    kept = folder / "wandb-run"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(secrets.token_hex(4), encoding="utf-8")
    return kept.read_text(encoding="utf-8")


def _events(folder: Path) -> list[Path]:
    return sorted(folder.glob("tensorboard/*/events.*"))


def mark_logs(folder: Path, logs: Sequence[Logger]) -> dict[str, int]:
    """Bytes of each log file, all of them on disk.

    Raises
    ------
    SaveError : they could not be written.
    """
    try:
        for log in logs:
            if isinstance(log, TensorBoardLogger):
                log.experiment.flush()
        files = [folder / METRICS, folder / SPEED, *_events(folder)]
        marks = {}
        for file in files:
            if file.exists():
                sync(file)
                marks[file.relative_to(folder).as_posix()] = file.stat().st_size
    except OSError as error:
        raise SaveError(f"{folder}: logs could not be written: {one_line(error)}") from error
    return marks


def take_back(folder: Path, marks: Mapping[str, int]) -> None:
    """Shorten the log files to what `mark_logs` marked; those begun later go.

    Raises
    ------
    InputError : a file is shorter than that, or not the run's.
    """
    for file in (folder / METRICS, folder / SPEED, *_events(folder)):
        mark = marks.get(file.relative_to(folder).as_posix())
        if mark is None:
            file.unlink(missing_ok=True)
    for name, mark in marks.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{file}: found a log outside the run; expected one below {folder}")
        size = file.stat().st_size if file.is_file() else 0
        if size < mark:
            raise InputError(
                f"{file}: found {size} bytes; expected {mark} or more, as when the run was saved "
                "(--fresh starts again)"
            )
        with file.open("r+b") as stream:
            stream.truncate(mark)
