"""What a pickle of tensors holds, found out without making one of them or calling what it names.

A pickle names functions and classes and says what to call them with. Here every name it may use
stands for a description of ours; any other name ends the reading before anything is called. What
comes out has tensors' shapes and the sizes of their storages, to be checked against the bytes
that are there before `torch.load` allocates anything.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import torch

# The one class outside torch and plain containers: public checkpoints keep their options in it.
ALLOWED_CLASS = argparse.Namespace
_ALLOWED_NAME = ("argparse", "Namespace")

_DTYPES: Mapping[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Builders of tensors that are not dense, and what to call these.
_NOT_DENSE: Mapping[str, str] = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values",
    "_rebuild_wrapper_subclass": "a subclass of tensor",
}


class RefusedError(ValueError):
    """The pickle asks for something that a file of tensors does not need."""


@dataclass(frozen=True)
class StorageType:
    """The class of a storage: its elements' type, None where the tensors say it."""

    dtype: torch.dtype | None


@dataclass(frozen=True)
class Storage:
    """Elements that tensors share: `key` names them in the file."""

    key: str
    dtype: torch.dtype | None
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * (1 if self.dtype is None else self.dtype.itemsize)


@dataclass(frozen=True)
class TensorOutline:
    """A dense tensor of the file, not made yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: Storage

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Outline:
    """What a pickle holds.

    Attributes
    ----------
    value : the pickled object, a `TensorOutline` for each tensor.
    storages : key -> storage, all that any tensor uses.
    classes : allow-listed classes it uses, by dotted name.
    """

    value: Any
    storages: dict[str, Storage]
    classes: tuple[str, ...]


def read_outline(stream: IO[bytes], size: int) -> Outline:
    """Outline of the pickle at the position of `stream`, which is left behind the pickle.

    Parameters
    ----------
    stream : seekable.
    size : bytes of the whole file or record; no memo index of a sound pickle is past it.

    Raises
    ------
    RefusedError : it names something else than tensors, containers and `ALLOWED_CLASS`; tensors
        that are not dense or reach past their storage; memo indices that would fill the memory.
    Exception : whatever a stream that is no pickle ends in.
    """
    start = stream.tell()
    for opcode, argument, _ in pickletools.genops(stream):
        if "PUT" in opcode.name and int(argument or 0) > size:
            raise RefusedError(f"memo index {argument} in a pickle of at most {size} bytes")
    stream.seek(start)
    reader = _Outliner(stream)
    value = reader.load()
    return Outline(value, reader.storages, tuple(sorted(reader.classes)))


class _Outliner(pickle.Unpickler):
    """Unpickler whose every name is one of the descriptions above."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == _ALLOWED_NAME:
            self.classes.add(f"{module}.{name}")
            return ALLOWED_CLASS
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return StorageType(_DTYPES[name])
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return StorageType(None)
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "torch._utils" and name in _BUILDERS:
            return _BUILDERS[name]
        if name in _NOT_DENSE:
            raise RefusedError(f"{_NOT_DENSE[name]} ({name}), expected dense tensors alone")
        raise RefusedError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise RefusedError(f"a reference {str(pid)[:60]!r}, expected a storage")
        _, kind, key, _, numel = pid[:5]
        if not isinstance(kind, StorageType) or type(numel) is not int or numel < 0:
            raise RefusedError(f"a storage of {numel} elements of {kind}")
        if len(pid) == 6 and pid[5] is not None:
            raise RefusedError("a view of a storage, as torch wrote before 0.4")
        storage = Storage(str(key), kind.dtype, numel)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise RefusedError(f"storage {key} of two sizes")
        return storage


def _outline(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *unused: Any,
    dtype: torch.dtype | None = None,
) -> TensorOutline:
    """A tensor, if it is dense and lies within its storage."""
    if not isinstance(storage, Storage):
        raise RefusedError(f"a tensor of {type(storage).__name__}, expected one of a storage")
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise RefusedError(f"a tensor of shape {shape}, strides {stride}, offset {offset}")
    of_type = storage.dtype or dtype
    if of_type is None:
        raise RefusedError("a tensor without a type")
    held = storage.numel if storage.dtype else storage.numel // of_type.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if prod(shape) and (last >= held or prod(shape) > held):
        raise RefusedError(
            f"a tensor of shape {list(shape)} and strides {list(stride)} from element {offset} of "
            f"a storage of {held}"
        )
    return TensorOutline(shape, of_type, storage)


def _outline_v3(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: torch.dtype,
    *unused: Any,
) -> TensorOutline:
    return _outline(storage, offset, shape, stride, dtype=dtype)


def _parameter(tensor: TensorOutline, *unused: Any) -> TensorOutline:
    if not isinstance(tensor, TensorOutline):
        raise RefusedError(f"a parameter of {type(tensor).__name__}, expected a tensor")
    return tensor


_BUILDERS: Mapping[str, Callable[..., TensorOutline]] = {
    "_rebuild_tensor": _outline,
    "_rebuild_tensor_v2": _outline,
    "_rebuild_tensor_v3": _outline_v3,
    "_rebuild_parameter": _parameter,
}
