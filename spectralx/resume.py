"""Where a run stands, on disk: written so that a crash at any moment leaves a whole one.

``<stage>/resume/step-<step>-<hash>.safetensors`` holds the tensors, and as JSON in its header all
else; ``frozen-<hash>.safetensors`` what never changes, once. A name carries the hash of the
contents and is given last: a file that bears such a name and matches it is good. Two states are
kept, so that the one before takes the place of one that was damaged. Reading runs no code that a
file could bring along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectralx.checkpoints.reading import sha256_of
from spectralx.cli import InputError, one_line
from spectralx.storage import put_in_place

FORMAT = "spectralx-resume-1"
KEPT = 2
_PARTIAL = ".partial"
_DIGITS = 16  # of the hash in a name
_NAME = re.compile(rf"step-(\d{{9}})-[0-9a-f]{{{_DIGITS}}}\.safetensors")


class SaveError(RuntimeError):
    """A file of the run that could not be written; what was saved before is whole."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes
    ----------
    step : optimiser steps done.
    tensors : by name.
    values : all else, as JSON holds it.
    """

    step: int
    tensors: dict[str, Tensor] = field(repr=False)
    values: dict[str, Any] = field(repr=False)


def _files(folder: Path) -> list[tuple[int, Path]]:
    """Step and file of every state in `folder`, the latest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted(((int(m[1]), path) for m, path in found if m is not None), reverse=True)


def _write(folder: Path, stem: str, tensors: Mapping[str, Tensor], values: str) -> Path:
    partial = folder / _PARTIAL
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(copies, partial, metadata={"format": FORMAT, "values": values})
        file = folder / f"{stem}-{sha256_of(partial)[:_DIGITS]}.safetensors"
        put_in_place(partial, file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise SaveError(
            f"{folder}: {stem} could not be saved: {one_line(error)}; "
            "what was saved before is whole"
        ) from error
    return file


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    digest = file.stem.rpartition("-")[2]
    found = sha256_of(file)[:_DIGITS]
    if found != digest:
        raise InputError(f"{file}: found contents of hash {found}; expected {digest}: damaged")
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{file}: found format {metadata.get('format')}; expected {FORMAT}, as this "
                "version writes"
            )
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    return tensors, metadata["values"]


def save_frozen(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write, once a run, what never changes; returns the name by which `load_frozen` finds it.

    Raises
    ------
    SaveError : it could not be written.
    """
    return _write(folder, "frozen", tensors, "{}").name


def load_frozen(folder: Path, name: str) -> dict[str, Tensor]:
    """What `save_frozen` wrote. Raises InputError where it is missing or damaged."""
    file = folder / Path(name).name
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected the frozen weights of the run")
    return _read(file)[0]


def save_state(folder: Path, state: RunState) -> Path:
    """Write `state` into `folder`; of the ones there the latest before it is kept.

    Raises
    ------
    SaveError : it could not be written; the ones there are as they were.
    """
    values = json.dumps({"step": state.step, **state.values})
    file = _write(folder, f"step-{state.step:09d}", state.tensors, values)
    # Later ones were damaged and have been passed over.
    older = [path for step, path in _files(folder) if step < state.step]
    for _, path in _files(folder):
        if path != file and path not in older[: KEPT - 1]:
            path.unlink(missing_ok=True)
    return file


def load_state(folder: Path, say: Callable[[str], object] = print) -> RunState | None:
    """The latest whole state in `folder`; None where there is none at all.

    Parameters
    ----------
    folder : that `save_state` wrote to.
    say : gets a line for each state that is damaged and passed over.

    Raises
    ------
    InputError : there are states, and none is whole.
    """
    files = _files(folder)
    for _, file in files:
        try:
            tensors, text = _read(file)
            values = json.loads(text)
            return RunState(int(values.pop("step")), tensors, values)
        except (InputError, OSError, SafetensorError, ValueError, KeyError) as error:
            say(f"{one_line(error)}; going on from the one before")
    if files:
        raise InputError(
            f"{folder}: found {len(files)} states, none of them whole; expected one to go on from "
            "(--fresh starts again)"
        )
    return None


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def check_unchanged(
    where: Path, began: Mapping[str, Any], now: Mapping[str, Any], grows: str
) -> None:
    """Settings that decide about numbers are those the run in `where` began with.

    Parameters
    ----------
    where : folder of the run.
    began, now : nested dictionaries of settings.
    grows : name of the setting that may be larger now.

    Raises
    ------
    InputError : names the first that differ.
    """
    before, after = _flat(began), _flat(now)
    changed = [
        f"{name}: found {after.get(name)}; expected {before.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
        and not (name == grows and after[name] > before[name])
    ]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise InputError(
            f"{'; '.join(changed[:3])}{more}, as the run in {where} began "
            f"({grows} may grow; --fresh starts again)"
        )
