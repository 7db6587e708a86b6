"""What training changed, alone: a small file that fits the model it was trained on and no other.

One safetensors file; its header's metadata holds a manifest as JSON. Base is everything that is
not in the file: its hash is in the manifest, and a model whose base has another is refused. A
tokenizer that is frozen at its random start is base too, unless it is included.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectralx.checkpoints.errors import CheckpointError, check_names, some
from spectralx.checkpoints.official import write_atomically
from spectralx.checkpoints.reading import container_of, load_safetensors
from spectralx_kernels import __version__

ADAPTERS_FORMAT = "spectralx-adapters"
ADAPTERS_VERSION = 1
_METADATA_KEY = "spectralx"


@dataclass(frozen=True)
class Adapters:
    """A file of adapters.

    Attributes
    ----------
    path : the file.
    manifest : format, versions, ``base_sha256``, ``sha256`` of the tensors, ``left_out`` names
        that neither are here nor count as base, ``config`` of the model and ``extra``.
    tensors : by the model's names, on the CPU.
    """

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trained(model: nn.Module) -> set[str]:
    """Entries of the state dict that training changes: what trains, and batch norms' counts."""
    names = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            prefix = f"{path}." if path else ""
            names |= {prefix + name for name, _ in module.named_buffers(recurse=False)}
    return names


def _matches(pattern: str | None, name: str) -> bool:
    return pattern is not None and re.search(pattern, name) is not None


def _stored(where: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` as it goes to the file: matrices in `dtype`."""
    if dtype is None or tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if not torch.equal(stored.isfinite(), tensor.isfinite()):
        largest = tensor.abs().max().item()
        raise CheckpointError(f"{where}: got values up to {largest:g}, expected some {dtype} holds")
    return stored


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of tensors by the parts of their model, numbers and what is inside a layer left out."""
    found: Counter[str] = Counter()
    for name, tensor in tensors.items():
        words = [word for word in name.split(".")[:-1] if not word.isdigit()]
        found[".".join(words[:4]) or name] += tensor.nbytes
    return dict(found)


def _base_sha256(state: Mapping[str, Tensor], without: Collection[str]) -> str:
    return tensors_sha256({name: each for name, each in state.items() if name not in without})


def save_adapters(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    leave_out: str | None = None,
    include: str | None = None,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write what trains of `model`, and the statistics of its batch norms, to one file.

    Parameters
    ----------
    path : the file, usually ``.safetensors``; its folder is made, and it is replaced in one step.
    model : any model; frozen parameters and other buffers are its base.
    leave_out : regular expression, searched for in names; what trains under such a name is not
        kept (``r"^(neck|head)\\."`` leaves the decoder of stage 2 out).
    include : regular expression; what is frozen under such a name is kept too and is no base
        (``r"^vit_backbone\\.patch_embed\\."``: HyperT, which no public file has).
    dtype : ``torch.float16`` or ``torch.bfloat16`` to store matrices and convolutions in half the
        bytes. Vectors (norms, scales, biases, batch norms' statistics) keep theirs. They are
        converted back on loading.
    extra : anything else worth keeping, as JSON holds it.

    Raises
    ------
    CheckpointError : nothing is left to keep, values that `dtype` cannot hold, or `extra` is not
        JSON.
    """
    state = model.state_dict()
    changed = _trained(model)
    wanted = [name for name in state if name in changed or _matches(include, name)]
    dropped = [name for name in wanted if _matches(leave_out, name)]
    kept = {
        name: _stored(f"{path}: {name}", state[name].detach().cpu(), dtype).contiguous()
        for name in wanted
        if name not in dropped
    }
    if not kept:
        raise CheckpointError(f"{path}: got a model of which nothing trains, expected adapters")
    manifest = {
        "format": ADAPTERS_FORMAT,
        "format_version": ADAPTERS_VERSION,
        "code_version": __version__,
        "model": type(model).__name__,
        "config": getattr(model, "config", None),
        "base": getattr(model, "base_weights", None),
        "base_sha256": _base_sha256(state, {*wanted}),
        "sha256": tensors_sha256(kept),
        "left_out": dropped,
        "extra": dict(extra or {}),
    }
    try:
        text = json.dumps(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return write_atomically(path, lambda file: save_file(kept, file, {_METADATA_KEY: text}))


def metadata_of(file: Path) -> dict[str, Any] | None:
    """The manifest in a safetensors file of adapters; None if it has none."""
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA_KEY)
    try:
        found = None if text is None else json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_adapters(path: str | os.PathLike[str]) -> Adapters:
    """Read a file of adapters and check the hash of its tensors.

    Raises
    ------
    CheckpointError : no such file, another format, or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, expected adapters")
    if container_of(file) != "safetensors":
        raise CheckpointError(f"{file}: not a safetensors file, expected adapters")
    tensors = load_safetensors(file)
    manifest = metadata_of(file)
    found = None if manifest is None else manifest.get("format")
    if manifest is None or found != ADAPTERS_FORMAT:
        raise CheckpointError(f"{file}: format: got {found!r}, expected {ADAPTERS_FORMAT!r}")
    if manifest.get("format_version") != ADAPTERS_VERSION:
        version = manifest.get("format_version")
        raise CheckpointError(f"{file}: format_version: got {version}, expected {ADAPTERS_VERSION}")
    digest = tensors_sha256(tensors)
    if digest != manifest.get("sha256"):
        raise CheckpointError(
            f"{file}: got tensors of sha256 {digest[:16]}..., expected "
            f"{str(manifest.get('sha256'))[:16]}...: the file is damaged"
        )
    return Adapters(file, manifest, tensors)


def load_adapters(model: nn.Module, source: Adapters | str | os.PathLike[str]) -> list[str]:
    """Copy adapters into a model whose base is the one they were trained on.

    Parameters
    ----------
    model : as it was when `save_adapters` wrote the file, but for what trains.
    source : the file.

    Returns
    -------
    Names that the file leaves out and that keep their values.

    Raises
    ------
    CheckpointError : unreadable, other names or shapes, or another base; the model is unchanged.
    """
    adapters = source if isinstance(source, Adapters) else read_adapters(source)
    state = model.state_dict()
    left_out = [str(name) for name in adapters.manifest.get("left_out") or ()]
    unknown = [name for name in left_out if name not in state]
    if unknown:
        raise CheckpointError(f"{adapters.path}: got no tensors {some(unknown)} in the model")
    check_names(
        str(adapters.path),
        {name: tuple(tensor.shape) for name, tensor in adapters.tensors.items()},
        {name: tuple(state[name].shape) if name in state else None for name in adapters.tensors},
    )
    base = _base_sha256(state, {*adapters.tensors, *left_out})
    expected = str(adapters.manifest.get("base_sha256"))
    if base != expected:
        known = adapters.manifest.get("base") or {}
        trained_on = f" ({known['file']})" if isinstance(known, dict) and "file" in known else ""
        raise CheckpointError(
            f"{adapters.path}: got a model whose other tensors have sha256 {base[:16]}..., "
            f"expected {expected[:16]}...{trained_on}: these adapters belong on another base"
        )
    model.load_state_dict(adapters.tensors, strict=False)
    return left_out
