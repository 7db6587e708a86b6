"""What a file is, found out without running any of it; ``python -m spectralx.checkpoints``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from spectralx.checkpoints.adapters import ADAPTERS_FORMAT, metadata_of
from spectralx.checkpoints.errors import CheckpointError, some
from spectralx.checkpoints.folder import FORMAT, MANIFEST, load
from spectralx.checkpoints.official import without_prefixes
from spectralx.checkpoints.pickles import TensorOutline
from spectralx.checkpoints.reading import container_of, outline_of, sha256_of, unwrapped
from spectralx.checkpoints.sources import prefix_of, source_of
from spectralx.cli import one_line

_LIGHTNING = "pytorch-lightning_version"
_SAFETENSORS_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1}
_SHOWN = 100  # characters of an option

Tensors = Mapping[str, tuple[tuple[int, ...], str, int]]  # name -> shape, type, bytes


def inspect(path: str | Path) -> list[str]:
    """Lines that say what a file or folder is; nothing in it is run, no tensor is made.

    Raises
    ------
    CheckpointError : it is not there.
    """
    file = Path(path)
    if file.name == MANIFEST and file.is_file():
        file = file.parent
    if file.is_dir():
        return _folder(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file or folder")
    lines = [f"{file}: {file.stat().st_size:,} bytes, sha256 {sha256_of(file)}"]
    try:
        container = container_of(file)
        described = _safetensors(file) if container == "safetensors" else _torch(file)
    except CheckpointError as error:
        return [*lines, f"not usable: {str(error).removeprefix(f'{file}: ')}"]
    return [*lines, f"container: {container}", *described]


def _folder(folder: Path) -> list[str]:
    if not (folder / MANIFEST).is_file():
        return [f"{folder}: a folder without {MANIFEST}, no checkpoint"]
    try:
        checkpoint = load(folder)
    except CheckpointError as error:
        return [f"{folder}: a damaged checkpoint of {FORMAT}: {error}"]
    manifest = checkpoint.manifest
    lines = [f"{folder}: {FORMAT} {manifest['format_version']}, a {manifest['model']} model, whole"]
    keys = ("code_version", "config", "wavelengths", "class_names", "normalisation", "base")
    lines += [f"{key}: {_short(manifest.get(key))}" for key in keys]
    entry = manifest["tensors"]
    lines.append(f"tensors: {entry['file']}, sha256 {entry['sha256']}")
    state = {
        name: (tuple(tensor.shape), _type(tensor.dtype), tensor.nbytes)
        for name, tensor in checkpoint.tensors.items()
    }
    return [*lines, *_tensors(state)]


def _safetensors(file: Path) -> list[str]:
    state: dict[str, tuple[tuple[int, ...], str, int]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                count = torch.Size(shape).numel()
                state[name] = (shape, kind, count * _SAFETENSORS_TYPES.get(kind, 1))
            metadata = opened.metadata()
        manifest = metadata_of(file)
    except Exception as error:  # safetensors raises its own and some of Rust's
        raise CheckpointError(f"{file}: not a safetensors file: {one_line(error)}") from error
    if manifest is not None and manifest.get("format") == ADAPTERS_FORMAT:
        base = manifest.get("base") or {}
        return [
            f"kind: {ADAPTERS_FORMAT} of a {manifest.get('model')}",
            f"code_version: {_short(manifest.get('code_version'))}",
            f"base: sha256 of its tensors {manifest.get('base_sha256')}, {_short(base)}",
            f"left out: {some(manifest.get('left_out') or ['nothing'])}",
            *_tensors(state),
        ]
    return [f"kind: {_kind(state, {})}", f"metadata: {_short(metadata)}", *_tensors(state)]


def _torch(file: Path) -> list[str]:
    outline = outline_of(file)
    classes = ", ".join(outline.classes) or "none"
    if not isinstance(outline.value, Mapping):
        kind = type(outline.value).__name__
        return [f"kind: a {kind}, no state dict", f"classes: {classes}"]
    held, rest = unwrapped(dict(outline.value))
    found = {name: value for name, value in held.items() if isinstance(value, TensorOutline)}
    state = {
        str(name): (each.shape, _type(each.dtype), each.numel * each.dtype.itemsize)
        for name, each in found.items()
    }
    rest |= {name: value for name, value in held.items() if name not in found}
    lines = [f"kind: {_kind(state, rest)}", f"classes: {classes}"]
    lines += [
        f"beside the tensors: {_printable(str(name))}: {_short(value)}"
        for name, value in rest.items()
    ]
    return [*lines, *_tensors(state)]


def _kind(state: Tensors, rest: Mapping[str, Any]) -> str:
    """Whose tensors these are, as far as names tell."""
    resumes = "optimizer_states" in rest or "loops" in rest
    lightning = " in a file of Lightning's" if _LIGHTNING in rest or resumes else ""
    if lightning and resumes:
        lightning += " to resume training from"
    plain = without_prefixes(dict.fromkeys(state))  # type: ignore[arg-type]
    if any(name.startswith("vit_backbone.") for name in plain):
        return f"stage 2 in the published names{lightning}"
    if any(".blocks_MoA." in name for name in plain):
        return f"stage 1 in the published names{lightning}"
    prefix = prefix_of(plain)
    source = source_of([name.removeprefix(prefix) for name in plain])
    if source is None:
        return f"tensors of an unknown model{lightning}"
    after = f", names after {prefix!r}" if prefix else ""
    return f"backbone, {source}{after}{lightning}"


def _tensors(state: Tensors) -> list[str]:
    types = Counter(kind for _, kind, _ in state.values())
    total = sum(size for _, _, size in state.values())
    counted = ", ".join(f"{count} of {kind}" for kind, count in types.most_common())
    lines = [f"{len(state)} tensors, {total:,} bytes: {counted}"]
    width = min(max(map(len, state), default=0), _SHOWN)
    lines += [
        f"  {_printable(name):<{width}}  {kind} {list(shape)}"
        for name, (shape, kind, _) in state.items()
    ]
    return lines


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    """One line of printable characters for an option, a number, a list or a dictionary."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        listed = ", ".join(f"{str(key)[:40]}={_leaf(item)}" for key, item in value.items())
        text = f"{len(value)} entries: {listed}" if value else "nothing"
    else:
        text = _leaf(value)
    cut = 8 * _SHOWN
    return _printable(text if len(text) <= cut else text[:cut] + "...")


def _printable(text: str) -> str:
    """`text` on one line, without what would steer a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _leaf(value: Any) -> str:
    if isinstance(value, (str, int, float, bool)) or value is None:
        text = json.dumps(value) if not isinstance(value, int) else str(value)[:_SHOWN]
    elif isinstance(value, TensorOutline):
        text = f"{_type(value.dtype)} {list(value.shape)}"
    elif isinstance(value, (list, tuple)) and all(
        isinstance(each, (str, int, float)) for each in value[:20]
    ):
        text = f"[{', '.join(map(_leaf, value[:20]))}{', ...' if len(value) > 20 else ''}]"
    else:
        size = f" of {len(value)}" if isinstance(value, (list, tuple, Mapping)) else ""
        text = f"<{type(value).__name__}{size}>"
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."
