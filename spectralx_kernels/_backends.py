"""Which backends exist on this machine, which one runs an operator, and why.

``eager`` is the reference in plain PyTorch and exists everywhere. ``cpp`` is C++ for the CPU and
``cuda`` is CUDA C++, both in the extension module ``spectralx_kernels._C``; ``triton`` is compiled
when it is called, for the GPU it runs on. Under ``TRITON_INTERPRET=1``, set before this package is
imported, Triton kernels also run on CPU tensors, slowly: that is for tests. Nothing here asks a
device anything at import.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

import torch  # first: the extension module links to its libraries

BACKENDS: Final = ("eager", "cpp", "triton", "cuda")
DEVICE_OF: Final = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}

TRITON_INSTALLED: Final = importlib.util.find_spec("triton") is not None
# As triton reads it.
_INTERPRET: Final = os.environ.get("TRITON_INTERPRET", "").lower()
INTERPRETED: Final = _INTERPRET in ("1", "true", "on", "yes", "y")
# SPECTRALX_UNPROVEN=1: what has replaced a kernel or its launch but not yet run on a GPU runs there
# instead of it. Tests of the interpreter run both.
UNPROVEN: Final = os.environ.get("SPECTRALX_UNPROVEN", "0") == "1"
# The interpreter computes in NumPy, which has no bfloat16, and rounds float16 at other places than
# a GPU does.
INTERPRETER_DTYPES: Final = (torch.float32, torch.float64)

# A plain global, for the whole process: torch.compile guards on it and recompiles when it changes.
_forced: str | None = None
_forced_required = True


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        from spectralx_kernels import _C  # type: ignore[attr-defined]
    except ImportError as error:
        if importlib.util.find_spec("spectralx_kernels._C") is None:
            reason = "the extension module spectralx_kernels._C was not built"
        else:
            reason = f"spectralx_kernels._C does not load: {error}"
        warnings.warn(f"spectralx_kernels runs on 'eager' only: {reason}", stacklevel=4)
        return None, reason
    return _C, ""


_extension, _extension_missing = _load_extension()

# (operator, backend) of every kernel that is registered, filled by `_operator.Operator`, and the
# dtypes it takes where it does not take all.
_kernels: dict[tuple[str, str], tuple[torch.dtype, ...] | None] = {}
_operators: dict[str, None] = {}


def extension() -> ModuleType | None:
    """The extension module ``_C``, or None where it was not built."""
    return _extension


def add_operator(operator: str) -> None:
    """List `operator` in `show_backends`."""
    _operators[operator] = None


def add_kernel(operator: str, backend: str, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """Record that `backend` has a kernel of `operator` here, for `dtypes` or all."""
    _kernels[operator, backend] = dtypes


def devices_of(backend: str) -> tuple[str, ...]:
    """Devices that kernels of `backend` run on."""
    if backend == "triton" and INTERPRETED:
        return ("cuda", "cpu")
    return (DEVICE_OF[backend],)


def _tensors(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    for arg in args:
        for value in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(value, torch.Tensor):
                yield value


def first_tensor(args: Sequence[Any]) -> torch.Tensor:
    """The first tensor among an operator's arguments, lists of tensors among them."""
    return next(_tensors(args))


def dtype_of(args: Sequence[Any]) -> torch.dtype | None:
    """The dtype of the first floating-point tensor among an operator's arguments."""
    return next((value.dtype for value in _tensors(args) if value.is_floating_point()), None)


def takes(dtypes: tuple[torch.dtype, ...], args: Sequence[Any]) -> bool:
    """Whether a kernel for `dtypes` takes these arguments."""
    dtype = dtype_of(args)
    return dtype is None or dtype in dtypes


def _dtypes_of(operator: str, backend: str, device: str | None) -> tuple[torch.dtype, ...] | None:
    dtypes = _kernels[operator, backend]
    if backend == "triton" and device == "cpu":
        return tuple(dtype for dtype in INTERPRETER_DTYPES if dtypes is None or dtype in dtypes)
    return dtypes


def operators() -> list[str]:
    """Names of all operators, in order of definition."""
    return list(_operators)


def available(
    operator: str, device: str | None = None, dtype: torch.dtype | None = None
) -> list[str]:
    """Backends that can run `operator` here, the default first.

    Parameters
    ----------
    operator : name of the operator, as `show_backends` prints it.
    device : "cpu" or "cuda" leaves out the backends of the other one.
    dtype : leaves out the backends that do not take it.
    """
    if operator not in _operators:
        raise ValueError(f"operator: got {operator!r}, expected one of {', '.join(_operators)}")
    return [name for name in _order(device) if _runs(operator, name, device, dtype)]


def _order(device: str | None) -> tuple[str, ...]:
    # On an H100 CUDA C++ is at least level and starts a third as long; an operator says where that
    # is not so. On a CPU Triton is only interpreted.
    return ("cpp", "eager", "triton") if device == "cpu" else ("cuda", "triton", "cpp", "eager")


def _runs(operator: str, backend: str, device: str | None, dtype: torch.dtype | None) -> bool:
    if backend == "eager":
        return True
    if (operator, backend) not in _kernels:
        return False
    if device is not None and device not in devices_of(backend):
        return False
    dtypes = _dtypes_of(operator, backend, device)
    return dtype is None or dtypes is None or dtype in dtypes


def why_not(operator: str, backend: str) -> str:
    """One line saying why `backend` does not run `operator` here."""
    if backend in ("cpp", "cuda") and _extension is None:
        return _extension_missing
    if backend == "cuda" and _extension is not None and not _extension.build_info()["cuda"]:
        return "spectralx_kernels._C was built without CUDA"
    if backend == "triton" and not TRITON_INSTALLED:
        return "triton is not installed"
    return f"no {backend} kernel of this operator is written"


def check_backend(backend: str) -> str:
    """`backend` itself if it is one of `BACKENDS`, else a ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    return backend


def choose(
    operator: str,
    device: str,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    prefer: str | None = None,
) -> str:
    """The backend that runs `operator` on `device` ("cpu", "cuda", ...) in `dtype`.

    An argument beats `use_backend`, which beats the environment variable ``SPECTRALX_BACKEND``;
    without any of them `prefer` runs, where it is there, else the default of the device.

    Raises
    ------
    ValueError : unknown backend name.
    RuntimeError : the forced backend cannot run this operator on this device or in this dtype.
    """
    forced = backend or _forced or os.environ.get("SPECTRALX_BACKEND")
    if not forced:  # most calls, each of which asks
        if prefer is not None and _runs(operator, prefer, device, dtype):
            return prefer
        return next(name for name in _order(device) if _runs(operator, name, device, dtype))
    here = available(operator, device, dtype)
    check_backend(forced)
    if not backend and not _forced_required and forced not in here:
        return here[0]
    if forced in here:
        return forced
    if forced in available(operator, device):
        taken = ", ".join(str(t) for t in _dtypes_of(operator, forced, device) or ())
        where = " on a CPU" if (forced, device) == ("triton", "cpu") else ""
        raise RuntimeError(f"backend {forced!r} of {operator} takes {taken}{where}, got {dtype}")
    if forced in available(operator):
        raise RuntimeError(
            f"backend {forced!r} of {operator} runs on {DEVICE_OF[forced]}, got tensors on {device}"
        )
    raise RuntimeError(f"backend {forced!r} cannot run {operator}: {why_not(operator, forced)}")


@contextmanager
def use_backend(backend: str, *, required: bool = True) -> Iterator[None]:
    """Force one backend for every operator called inside the ``with`` block, in every thread.

    Raises ValueError for an unknown name. An operator that has no kernel of it raises
    RuntimeError when it is called or, with ``required=False``, keeps its default.
    """
    global _forced, _forced_required
    before = _forced, _forced_required
    _forced, _forced_required = check_backend(backend), required
    try:
        yield
    finally:
        _forced, _forced_required = before


def show_backends() -> str:
    """A table of what runs where: a row an operator, a column a backend.

    A cell is ``-`` where the backend has no kernel, and names the devices it is the default of.
    Prints the table, and under it why a backend is missing, and returns the same text.
    """
    width = max(map(len, _operators), default=8)
    lines = [f"{'operator':{width}}  " + "".join(f"{backend:23}" for backend in BACKENDS)]
    for name in _operators:
        cells = []
        for backend in BACKENDS:
            default_of = [d for d in ("cpu", "cuda") if available(name, d)[0] == backend]
            note = f" (default {'+'.join(default_of)})" if default_of else ""
            cells.append(("yes" if backend in available(name) else "-") + note)
        lines.append(f"{name:{width}}  " + "".join(f"{cell:23}" for cell in cells).rstrip())
    lines.append(f"torch {torch.__version__}, GPU seen by torch: {torch.cuda.is_available()}")
    reasons: dict[str, list[str]] = {}
    for backend in BACKENDS[1:]:
        for name in _operators:
            if (name, backend) not in _kernels:
                reasons.setdefault(f"{backend}: {why_not(name, backend)}", []).append(name)
    for (name, backend), dtypes in _kernels.items():
        if dtypes is not None:
            taken = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            reasons.setdefault(f"{backend}: {taken} only", []).append(name)
    for reason, names in reasons.items():
        which = "all operators" if len(names) == len(_operators) else ", ".join(names)
        lines.append(f"{reason} ({which})")
    text = "\n".join(lines)
    print(text)
    return text
