"""State dicts from elsewhere: reading them without running code, and fitting them to a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spectralx.cli import one_line
from spectralx_kernels import official_inert, official_parameters


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file, what was found and what is expected."""


def load_official(model: nn.Module, source: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
    """Load the paper's published state dict: every name of it, and every name of the model.

    Parameters
    ----------
    model : takes the published names where its modules derive from
        `spectralx_kernels.OfficialNames`.
    source : a state dict, or a file: ``.safetensors``, or what ``torch.save`` wrote. A
        ``state_dict`` or ``model`` entry that holds it and a ``module.`` before every name
        (data-parallel training) are taken off.

    Raises
    ------
    CheckpointError : unreadable, or names or shapes that differ. Names are checked before
        anything is loaded; after an error in a shape the model is to be thrown away.
    """
    where, state = read_state_dict(source)
    inert = official_inert(model)
    expected = [*official_parameters(model), *(name for name in inert if name in state)]
    check_names(where, dict.fromkeys(state), dict.fromkeys(expected))
    for name, shape in inert.items():
        if name in state and tuple(state[name].shape) != shape:
            found = list(state[name].shape)
            raise CheckpointError(f"{where}: {name}: got shape {found}, expected {list(shape)}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # other shapes: its first line is a heading
        lines = [line.strip() for line in str(error).splitlines()]
        first = lines[1] if len(lines) > 1 else lines[0]
        more = f" ({len(lines) - 2} more)" if len(lines) > 2 else ""
        raise CheckpointError(f"{where}: {first}{more}") from error


def read_state_dict(
    source: Mapping[str, Tensor] | str | os.PathLike[str],
) -> tuple[str, dict[str, Tensor]]:
    """What to call `source` in errors, and the state dict it is or holds; see `load_official`."""
    if isinstance(source, Mapping):
        where, state = "state_dict", dict(source)
    else:
        where, state = str(source), _read_file(Path(source))
    state = _unwrapped(state)
    not_tensors = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise CheckpointError(f"{where}: {some(not_tensors)}: not tensors, expected a state dict")
    return where, state


def check_names(
    where: str,
    found: Mapping[str, tuple[int, ...] | None],
    expected: Mapping[str, tuple[int, ...] | None],
) -> None:
    """Raise one line for all differences between the names (and shapes) found and expected."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    wrong = [
        f"{name} (got {found[name]}, expected {shape})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} tensors {what}: {some(names)}"
        for what, names in (
            ("of another shape", wrong),
            ("missing", missing),
            ("not expected", surplus),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{where}: " + "; ".join(problems))


def some(names: list[str], count: int = 3) -> str:
    """The first names of a list, and dots for the rest."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _read_file(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, expected a state dict")
    if file.suffix == ".safetensors":
        return dict(load_safetensors(file))
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is no pickle ends in any of them
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{file}: not a file of tensors alone: {first}") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file}: got {type(state).__name__}, expected a state dict")
    return dict(state)


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = dict(state[key])
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a CheckpointError where it is none."""
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {one_line(error)}") from error
