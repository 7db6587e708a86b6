"""Launching Triton kernels, and compiling the same launches for a GPU that is not there.

A room's ``triton.py`` launches through `launch`. Inside `recorded()` a launch is noted down instead
of run: with tensors on the device "meta" the room's own functions say what they would compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectralx_kernels._backends import INTERPRETED, UNPROVEN
from spectralx_kernels._triton_launch import start
from spectralx_kernels._triton_races import race

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that one program can have; NVIDIA's tables of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Compilation(NamedTuple):
    """A kernel as one launch compiles it."""

    kernel: Any  # a function of triton.jit
    arguments: dict[str, Any]  # by parameter
    options: dict[str, int]  # num_warps, num_stages
    architectures: tuple[int, ...] = ARCHITECTURES
    dtype: str = ""
    shape: str = ""


class Usage(NamedTuple):
    """What a compiled kernel takes of a multiprocessor, bytes but for the registers, and what
    `_triton_races.race` says of it."""

    registers: int
    shared: int
    spilled: int
    race: str


_recording: list[Compilation] | None = None
_assumed: int | None = None


def launch(kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
    """``kernel[grid](*args, **kwargs)``."""
    if _recording is None:
        if UNPROVEN and not INTERPRETED:
            start(kernel, grid, args, kwargs)
        else:
            kernel[grid](*args, **kwargs)
        return
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    options = {"num_warps": 4, "num_stages": 3}
    options |= {name: given.pop(name) for name in list(given) if name in options}
    _recording.append(Compilation(kernel, given, options))


@contextmanager
def recorded(assumed: int = ARCHITECTURES[-1]) -> Iterator[list[Compilation]]:
    """Launches inside the block are appended to the list it gives, as they are on a GPU of the
    architecture `assumed`."""
    global _recording, _assumed
    _recording, _assumed = [], assumed
    try:
        yield _recording
    finally:
        _recording = _assumed = None


def architecture() -> int:
    """Of the current GPU: 80, 90, ...; without one, the latest."""
    if _assumed is not None:
        return _assumed
    if INTERPRETED:
        return ARCHITECTURES[-1]
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def source_of(compilation: Compilation) -> ASTSource:
    """What Triton is given to compile."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(compilation.kernel.params):
        value = compilation.arguments.get(parameter.name, parameter.default)
        kind = "constexpr"
        aligned = False
        if parameter.is_constexpr or value is None:
            pass
        elif isinstance(value, Tensor):
            kind, aligned = _POINTERS[value.dtype], True
        elif isinstance(value, float):
            kind = "fp32"
        elif value != 1 or parameter.do_not_specialize:
            kind = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[place,] = value
        elif aligned:
            attributes[place,] = [["tt.divisibility", 16]]
    return ASTSource(compilation.kernel, signature, constants, attributes)


def compile_for(compilation: Compilation, architecture: int) -> Usage:
    """Compile for sm_`architecture` without a GPU; raises what triton or ptxas say."""
    compiled = triton.compile(
        source_of(compilation),
        target=GPUTarget("cuda", architecture, 32),
        options=dict(compilation.options),
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=False
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump: got {report.stderr!r}, expected resource usage")
    # Triton's kernels have no arrays of their own: a stack frame holds spilled registers.
    return Usage(
        int(found[1]), compiled.metadata.shared, int(found[2]), race(compiled.asm["ttgir"])
    )
