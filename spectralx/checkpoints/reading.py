"""Files of tensors, read without running code and without more memory than the file has bytes.

Three containers: safetensors, the zip that `torch.save` writes, and what it wrote before. Of the
last two only tensors, plain containers and ``argparse.Namespace`` are read; every tensor is held
against its storage, and every storage against the bytes in the file, before one is made.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from spectralx.checkpoints.errors import CheckpointError, some
from spectralx.checkpoints.pickles import ALLOWED_CLASS, Outline, RefusedError, read_outline
from spectralx.cli import one_line

Container = Literal["safetensors", "torch zip", "torch legacy", "state dict"]
Source = Mapping[str, Any] | str | os.PathLike[str]

# Entries that hold the state dict, outermost first.
WRAPPERS = ("state_dict", "model", "teacher")
# What torch wrote before its zip files: three pickles, the object's, and one of storage keys.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_SIZE = 8  # bytes before each storage, which say its length
# A hash at the end of a file's name, as torch.hub checks it; digits alone may be a date.
_NAMED_HASH = re.compile(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.[a-z]+$")


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors.

    Attributes
    ----------
    where : what to call it in errors.
    container : how it is written.
    sha256 : of the file; None for a state dict in memory.
    tensors : the state dict in it, on the CPU.
    rest : what stands beside the state dict: options, step, optimizer.
    """

    where: str
    container: Container
    sha256: str | None
    tensors: dict[str, Tensor] = field(repr=False)
    rest: dict[str, Any] = field(repr=False)


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def container_of(file: Path) -> Container:
    """How `file` is written, by its first bytes."""
    with file.open("rb") as stream:
        head = stream.read(9)
    if head[:4] == b"PK\x03\x04":
        return "torch zip"
    length = int.from_bytes(head[:8], "little")
    plausible = len(head) == 9 and head[8:] == b"{" and length + 8 <= file.stat().st_size
    return "safetensors" if plausible or file.suffix == ".safetensors" else "torch legacy"


def outline_of(file: Path) -> Outline:
    """What a file of `torch.save` holds, its sizes checked against the file; see `pickles`.

    Raises
    ------
    CheckpointError : it is none, it holds more than tensors, or sizes that are not there.
    """
    try:
        if container_of(file) == "torch zip":
            return _zip_outline(file)
        return _legacy_outline(file)
    except RefusedError as error:
        raise CheckpointError(f"{file}: not a file of tensors alone: {error}") from error
    except Exception as error:  # a file that is no pickle ends in any of them
        raise CheckpointError(
            f"{file}: not a file of tensors alone: no pickle of torch.save ({one_line(error)})"
        ) from error


def _zip_outline(file: Path) -> Outline:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
            raise RefusedError("compressed records, expected them as they are")
        if sum(info.file_size for info in records.values()) > file.stat().st_size:
            raise RefusedError("records of more bytes than the file has")
        pickles = [name for name in records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise RefusedError(f"{len(pickles)} records data.pkl, expected one")
        folder = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(f"{folder}code/") for name in records):
            raise RefusedError("a TorchScript program")
        with archive.open(pickles[0]) as stream:
            outline = read_outline(stream, records[pickles[0]].file_size)
    for key, storage in outline.storages.items():
        record = records.get(f"{folder}data/{key}")
        held = -1 if record is None else record.file_size
        if held != storage.nbytes:
            found = "no record" if record is None else f"{held} bytes"
            raise RefusedError(f"storage {key}: {found}, expected {storage.nbytes} bytes")
    return outline


def _legacy_outline(file: Path) -> Outline:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = read_outline(stream, size)
        if first.value != _LEGACY_MAGIC:
            raise RefusedError("a pickle of something else than torch.save")
        for _ in range(2):
            read_outline(stream, size)
        outline = read_outline(stream, size)
        keys = read_outline(stream, size).value
        position = stream.tell()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(outline.storages):
        raise RefusedError("other storages than the tensors name")
    needed = sum(storage.nbytes + _LEGACY_SIZE for storage in outline.storages.values())
    if needed != size - position:
        raise RefusedError(f"{size - position} bytes of storages, expected {needed}")
    return outline


def read_file(source: Source, *, sha256: str | None = None) -> TensorFile:
    """The state dict in a file, or one in memory, and what stands beside it.

    Parameters
    ----------
    source : a state dict, or a file: safetensors, or of `torch.save`. Entries ``state_dict``,
        ``model`` or ``teacher`` that hold it are taken off.
    sha256 : of the file, or its first 8 digits and more; it must be that. A name that ends in
        such digits (``dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth``) is held to them.

    Raises
    ------
    CheckpointError : no such file, another hash, not a file of dense tensors alone, sizes that
        are not in the file, or no state dict in it.
    """
    if isinstance(source, Mapping):
        state, rest = unwrapped(dict(source))
        return TensorFile("state_dict", "state dict", None, _checked("state_dict", state), rest)
    file = Path(source)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, expected a state dict")
    digest = sha256_of(file)
    named = _NAMED_HASH.search(file.name)
    for expected in (sha256, named and named[1]):
        if expected and (len(expected) < 8 or not digest.startswith(expected.lower())):
            raise CheckpointError(f"{file}: got sha256 {digest[:16]}..., expected {expected}")
    container = container_of(file)
    if container == "safetensors":
        tensors = load_safetensors(file)
        return TensorFile(str(file), container, digest, _checked(str(file), tensors), {})
    outline_of(file)
    try:
        with torch.serialization.safe_globals([ALLOWED_CLASS]):
            value = torch.load(
                file, map_location="cpu", weights_only=True, mmap=container == "torch zip"
            )
    except Exception as error:  # torch raises several of its own
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{file}: not a file of tensors alone: {first}") from error
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{file}: got {type(value).__name__}, expected a state dict")
    state, rest = unwrapped(dict(value))
    return TensorFile(str(file), container, digest, _checked(str(file), state), rest)


def unwrapped(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict that `state` is or holds, and the entries beside it."""
    rest: dict[str, Any] = {}
    for key in WRAPPERS:
        if isinstance(state.get(key), Mapping):
            inner = dict(state.pop(key))
            rest |= state
            state = inner
    return state, rest


def _checked(where: str, state: dict[str, Any]) -> dict[str, Tensor]:
    not_tensors = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise CheckpointError(f"{where}: {some(not_tensors)}: not tensors, expected a state dict")
    other = [
        str(name)
        for name, value in state.items()
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta
    ]
    if other:
        raise CheckpointError(f"{where}: {some(other)}: not dense, expected dense tensors")
    return state


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a CheckpointError where it is none."""
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a safetensors file: {one_line(error)}") from error
