"""Our own checkpoints: safetensors and a manifest.

A checkpoint is a folder::

    manifest.json                   what the model is, and the hash of its tensors
    model-<hash>.safetensors        every entry of its state dict

The manifest is replaced last and in one step, so a folder always holds a whole checkpoint: the
one before or the new one. Reading one runs no code that a file could bring along.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from spectralx.checkpoints.errors import CheckpointError, check_names
from spectralx.checkpoints.reading import load_safetensors, sha256_of
from spectralx.cli import one_line
from spectralx.reconstruction import MaskedReconstruction
from spectralx.segmentation import Segmentation
from spectralx.storage import put_in_place
from spectralx_kernels import __version__

FORMAT = "spectralx-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# What a manifest may name as its model.
_MODELS: dict[str, type[nn.Module]] = {
    "reconstruction": MaskedReconstruction,
    "segmentation": Segmentation,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk.

    Attributes
    ----------
    path : its folder.
    manifest : everything the manifest holds.
    tensors : the state dict, on the CPU.
    """

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build the model."""
        return dict(self.manifest["config"])

    def build(self) -> nn.Module:
        """The model of the manifest with the tensors of the checkpoint, in evaluation mode.

        Raises
        ------
        CheckpointError : the configuration does not build a model, or not one of these sizes.
        """
        model = make_model(self.path, self.manifest)
        self.load_into(model)
        note_base(model, self.manifest.get("base"))
        return model.eval()

    def load_into(self, model: nn.Module) -> None:
        """Copy every tensor into `model`, which must have exactly these names and shapes.

        Raises
        ------
        CheckpointError : it has not; the model is unchanged.
        """
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        check_names(str(self.path), found, own)
        model.load_state_dict(self.tensors)


def make_model(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """The model that the manifest in `folder` describes, as it starts.

    Raises
    ------
    CheckpointError : an unknown model, or a configuration that does not build one.
    """
    kind = manifest["model"]
    if kind not in _MODELS:
        raise CheckpointError(
            f"{folder / MANIFEST}: model: got {kind!r}, expected one of {', '.join(_MODELS)}"
        )
    try:
        return _MODELS[kind](**manifest["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: config: {one_line(error)}") from error


def note_base(model: nn.Module, base: Mapping[str, Any] | None) -> None:
    """Keep on `model` what it started from, for the manifest of its checkpoints."""
    object.__setattr__(model, "base_weights", None if base is None else dict(base))


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    config: Mapping[str, Any] | None = None,
    *,
    wavelengths: list[float] | None = None,
    class_names: list[str] | None = None,
    normalisation: Mapping[str, Any] | str | None = None,
    base: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint of `model` into the folder `path`, replacing the one there.

    Parameters
    ----------
    path : a folder; made where it does not exist.
    model : a `MaskedReconstruction` or a `Segmentation`.
    config : arguments that rebuild the model; ``model.config`` by default.
    wavelengths : of the bands, in micrometres.
    class_names : by index, the unlabelled class first.
    normalisation : how images are scaled before they reach the model.
    base : name and sha256 of the weights the model started from; by default those that
        `initialise_backbone` or `initialise_from_stage1` noted on the model.
    extra : anything else worth keeping (step, scores, ...), as JSON holds it.
    tensors : the state dict to write, where it is not the model's own (averaged weights, weights
        gathered from several processes).

    Returns
    -------
    The folder.

    Raises
    ------
    CheckpointError : another kind of model, a configuration that JSON cannot hold, or a `path`
        that is a file.
    """
    folder = Path(path)
    kind = next((name for name, cls in _MODELS.items() if isinstance(model, cls)), None)
    if kind is None:
        names = ", ".join(cls.__name__ for cls in _MODELS.values())
        raise CheckpointError(f"model: got {type(model).__name__}, expected one of {names}")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "code_version": __version__,
        "model": kind,
        "config": dict(getattr(model, "config", {}) if config is None else config),
        "wavelengths": wavelengths,
        "class_names": class_names,
        "normalisation": normalisation,
        "base": getattr(model, "base_weights", None) if base is None else dict(base),
        "extra": dict(extra or {}),
    }
    try:
        json.dumps(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error}") from error
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: got a file, expected a folder or nothing")
    folder.mkdir(parents=True, exist_ok=True)

    state = model.state_dict() if tensors is None else tensors
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as scratch:
        new = Path(scratch, "model")
        new.touch()
        mode = new.stat().st_mode  # safetensors makes files that only their owner reads
        save_file(written, new)
        new.chmod(mode)
        digest = sha256_of(new)
        tensor_file = folder / f"model-{digest[:16]}.safetensors"
        manifest["tensors"] = {
            "file": tensor_file.name,
            "sha256": digest,
            "bytes": new.stat().st_size,
        }
        new_manifest = Path(scratch, MANIFEST)
        new_manifest.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        put_in_place(new, tensor_file)
        put_in_place(new_manifest, folder / MANIFEST)
    for old in folder.glob("model-*.safetensors"):
        if old != tensor_file:
            old.unlink(missing_ok=True)
    return folder


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of the checkpoint in the folder `path`.

    Raises
    ------
    CheckpointError : no checkpoint there, or another format.
    """
    folder = Path(path)
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: got a file, expected a checkpoint folder (python -m spectralx.checkpoints "
            "inspect says what it is)"
        )
    file = folder / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{folder}: got no {MANIFEST}, expected a checkpoint folder")
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {one_line(error)}") from error
    _check_manifest(file, manifest)
    return manifest


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the checkpoint in the folder `path` (or whose manifest `path` is) and check its hash.

    Raises
    ------
    CheckpointError : no checkpoint there, another format, or tensors that are missing, damaged
        or not those of the manifest.
    """
    folder = folder_at(path)
    manifest = read_manifest(folder)
    return Checkpoint(folder, manifest, load_safetensors(checked_tensors(folder, manifest)))


def folder_at(path: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint whose folder or manifest `path` is."""
    folder = Path(path)
    return folder.parent if folder.name == MANIFEST else folder


def checked_tensors(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """The file of tensors that `manifest` names in `folder`, its hash checked.

    Raises
    ------
    CheckpointError : tensors that are missing, damaged or not those of the manifest.
    """
    file = folder / MANIFEST
    entry = manifest["tensors"]
    tensor_file = folder / str(entry["file"])
    if not tensor_file.is_file():
        raise CheckpointError(f"{tensor_file}: no such file, expected the tensors of {file}")
    digest = sha256_of(tensor_file)
    if digest != entry["sha256"]:
        raise CheckpointError(
            f"{tensor_file}: got sha256 {digest[:16]}..., expected {entry['sha256'][:16]}... "
            "as in its manifest: the file is damaged or of another checkpoint"
        )
    return tensor_file


def _check_manifest(file: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{file}: format: got {found!r}, expected {FORMAT!r}")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format_version: got {version}, expected {FORMAT_VERSION}")
    if not isinstance(manifest.get("model"), str):
        raise CheckpointError(f"{file}: model: got {manifest.get('model')!r}, expected a name")
    if not isinstance(manifest.get("config"), dict):
        raise CheckpointError(f"{file}: config: got {manifest.get('config')!r}, expected an object")
    entry = manifest.get("tensors")
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), str) for key in ("file", "sha256")
    ):
        raise CheckpointError(f"{file}: tensors: got {entry!r}, expected a file and its sha256")
    if Path(entry["file"]).name != entry["file"]:
        raise CheckpointError(
            f"{file}: tensors: got file {entry['file']!r}, expected a name in the same folder"
        )
