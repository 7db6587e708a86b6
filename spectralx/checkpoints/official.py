"""State dicts of the published implementation, in and out, by its own names.

Its files are Lightning's: ``{"state_dict": {"model.<name>": tensor}, ...}``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from spectralx.backbones.mae import MaskedAutoencoder
from spectralx.checkpoints.errors import CheckpointError, check_names
from spectralx.checkpoints.reading import Source, read_file
from spectralx_kernels import official_inert, official_parameters
from spectralx_kernels import official_state_dict as kernels_state_dict

# What data-parallel training, Lightning and torch.compile put before every name.
_PREFIXES = ("module.", "model.", "_orig_mod.")


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without what stands before every name of it."""
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            inner = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            return without_prefixes(inner)
    return state


def load_official(model: nn.Module, source: Source, *, sha256: str | None = None) -> None:
    """Load the paper's published state dict: every name of it, and every name of the model.

    Parameters
    ----------
    model : takes the published names where its modules derive from
        `spectralx_kernels.OfficialNames`.
    source : a state dict, or a file, as `reading.read_file` takes it. What stands before every
        name (``model.`` of Lightning, ``module.`` of data-parallel training) is taken off.
    sha256 : what the file must have.

    Raises
    ------
    CheckpointError : unreadable, or names or shapes that differ. Names are checked before
        anything is loaded; after an error in a shape the model is to be thrown away.
    """
    file = read_file(source, sha256=sha256)
    where, state = file.where, without_prefixes(file.tensors)
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


def official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of `model` under its published name, and those without effect here.

    Of the latter, position tables have their values, norms are the identity, the rest is zero.
    """
    state = {name: tensor.clone() for name, tensor in kernels_state_dict(model).items()}
    tables: dict[str, Tensor] = {}
    if isinstance(model, MaskedAutoencoder):
        tables["pos_embed"] = model.positions[None]
        tables["decoder_pos_embed"] = model.decoder_positions[None]
    for name, shape in official_inert(model).items():
        if name in tables:
            state[name] = tables[name].clone()
        elif name not in state:
            make = torch.ones if name.endswith("norm.weight") else torch.zeros
            state[name] = make(shape)
    return state


def export_official(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write `model` as the published implementation's checkpoint, in one step.

    Parameters
    ----------
    model : a `MaskedReconstruction` or a `Segmentation` of the published layout.
    path : the file, usually ``.ckpt``; its folder is made.

    Returns
    -------
    The file; `load_official` reads it back to the same logits.
    """
    state = {f"model.{name}": tensor.cpu() for name, tensor in official_state_dict(model).items()}
    return write_atomically(path, lambda file: torch.save({"state_dict": state}, file))


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Have `write` make the file `path`, its folder included, in one step: all or nothing."""
    target = Path(path)
    if target.is_dir():
        raise CheckpointError(f"{target}: got a folder, expected a file or nothing")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=target.parent) as scratch:
        new = Path(scratch, target.name)
        new.touch()
        mode = new.stat().st_mode  # safetensors makes files that only their owner reads
        write(new)
        new.chmod(mode)
        os.replace(new, target)
    return target
