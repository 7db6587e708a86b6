"""Compiles .cu files with the host compiler against shim.h, once for each state of the sources."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "shim.h"
BUILD = ROOT / "build" / "cuda_on_cpu"
SANITIZE = os.environ.get("SPECTRALX_SANITIZE") == "1"  # set by sanitized.py
CHECKS = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment") if SANITIZE else ()
FLAGS = (
    "-std=c++20",
    "-x",
    "c++",
    "-fPIC",
    "-fno-gnu-unique",
    "-Wall",
    "-Wno-unknown-pragmas",
    *CHECKS,
)


def compiler() -> str | None:
    """Path of the host's C++ compiler."""
    return next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def compile_cuda(sources: Sequence[Path], *flags: str) -> Path:
    """The shared library (the program, without -shared) made of `sources`; from the cache if kept.

    Raises
    ------
    RuntimeError : no compiler, or what it said.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("compile_cuda: no C++ compiler found, expected g++ or clang++")
    inputs = sorted({SHIM, *sources, *(ROOT / "csrc" / "cuda").rglob("*.[ch]*")})
    digest = hashlib.sha256(" ".join((cxx, *flags, *FLAGS, *map(str, sources))).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = BUILD / f"{sources[0].stem}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    command = [cxx, *FLAGS, *flags, "-I", str(ROOT / "csrc"), "-include", str(SHIM)]
    command += [*map(str, sources), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stderr:
        partial.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    partial.replace(target)  # whole or not at all, also when several processes build it
    return target


def load(library: Path) -> ctypes.CDLL:
    """The library, its shim functions typed."""
    loaded = ctypes.CDLL(str(library))
    loaded.spectralx_shim_error.restype = ctypes.c_char_p
    loaded.spectralx_shim_launches.restype = ctypes.c_long
    return loaded
