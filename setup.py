"""Builds the extension module spectralx_kernels._C from csrc/.

Environment variables:
  SPECTRALX_NO_EXT=1    no extension; everything runs on 'eager'
  SPECTRALX_NATIVE=1    CPU kernels for this machine's instruction set only
  FORCE_CUDA=1          CUDA sources even where no GPU can be seen; an error without nvcc
  USE_CUDA=0            no CUDA sources
  TORCH_CUDA_ARCH_LIST  e.g. "8.0;9.0a"; GPU architectures, never read off a device
  MAX_JOBS=N            parallel compiler processes
  DEBUG=1               -O0, symbols and assertions
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def flag(name: str) -> bool | None:
    """The environment variable as a boolean; None where it is not set."""
    value = os.environ.get(name, "").strip().lower()
    if not value:
        return None
    if value in ("1", "on", "true", "yes"):
        return True
    if value in ("0", "off", "false", "no"):
        return False
    sys.exit(f"{name}: got {value!r}, expected 0 or 1")


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    names = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++", "cl"]
    return any(name and shutil.which(name) for name in names)


def find_nvcc() -> str | None:
    """Path of nvcc, from CUDA_HOME or PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def use_cuda() -> bool:
    """Whether CUDA sources are built; stops with one line where that was asked for in vain."""
    import torch

    forced, wanted = flag("FORCE_CUDA"), flag("USE_CUDA")
    if forced and wanted is False:
        sys.exit("FORCE_CUDA=1 and USE_CUDA=0: got both, expected one of them")
    if wanted is False:
        return False
    asked = "FORCE_CUDA=1" if forced else "USE_CUDA=1" if wanted else ""
    if torch.version.cuda is None:
        if asked:
            sys.exit(f"{asked}: torch {torch.__version__} has no CUDA, expected a CUDA build")
        return False
    if find_nvcc() is None:
        if asked:
            sys.exit(f"{asked}: nvcc was not found on PATH or in CUDA_HOME, expected it there")
        return False
    return True


def precompile(header: str, folder: Path, compiler: str, options: list[str]) -> None:
    """Compiles csrc/`header` into `folder`, first in GCC's search path, unless it is there already.

    GCC takes it for an ``#include "header"`` that opens a file, and reads the header itself where
    it was compiled with other options. Other compilers have no such search, and read it each time.
    """
    import torch

    command = shlex.split(compiler)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    if "Free Software Foundation" not in version.stdout:
        return
    target = folder / f"{header}.gch"
    command += [*options, "-x", "c++-header", str(ROOT / "csrc" / header), "-o", str(target)]
    made_by = "\n".join([torch.__version__, version.stdout, shlex.join(command)])
    note = target.with_suffix(".txt")
    if target.exists() and note.exists() and note.read_text() == made_by:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stderr}")
    note.write_text(made_by)


def extension() -> dict[str, Any]:
    """The ext_modules and cmdclass arguments of setup()."""
    if flag("SPECTRALX_NO_EXT"):
        print("spectralx: SPECTRALX_NO_EXT=1, building without the extension module")
        return {}
    if not has_compiler():
        print("spectralx: no C++ compiler found, building without the extension module")
        return {}
    from torch.utils.cpp_extension import (
        BuildExtension,
        CppExtension,
        CUDAExtension,
        get_cxx_compiler,
    )

    debug = bool(flag("DEBUG"))
    native = bool(flag("SPECTRALX_NATIVE"))
    cuda = use_cuda()
    # Python's own flags hold -g; without it the build is quicker and the module a twentieth.
    optimise = ["-O0", "-g"] if debug else ["-O3", "-DNDEBUG", "-g0"]
    cxx = ["-std=c++20", "-Wall", "-Wno-unknown-pragmas", *optimise]
    if sys.platform == "win32":
        cxx = ["/std:c++20", "/Od" if debug else "/O2"]
    elif native:
        cxx += ["-march=native"]
    if sys.platform != "win32":
        # What vectorising kernels needs: no error codes or traps of single operations.
        cxx += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    # at::parallel_for is an inline function: compiled without OpenMP it runs on one thread. The run
    # time is the libgomp that torch has loaded already.
    threads = ["-fopenmp"] if sys.platform.startswith("linux") else []
    cxx += threads
    macros: list[tuple[str, str | None]] = [("SPECTRALX_NATIVE", None)] if native else []
    csrc = ROOT / "csrc"
    sources = [*sorted(csrc.glob("*.cpp")), *sorted((csrc / "cpu").rglob("*.cpp"))]
    options: dict[str, Any] = {"cxx": cxx}
    if cuda:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        macros += [
            ("SPECTRALX_CUDA", None),
            ("SPECTRALX_ARCHITECTURES", f'"{architectures}"'),
        ]
        device_code = csrc / "cuda"
        sources += sorted([*device_code.rglob("*.cu"), *device_code.rglob("*.cpp")])
        options["nvcc"] = ["-std=c++20", "-lineinfo", *(["-O0", "-G"] if debug else ["-O3"])]
    # Absolute for GCC, which runs wherever ninja does.
    precompiled = ROOT / "build" / "precompiled"
    module = (CUDAExtension if cuda else CppExtension)(
        "spectralx_kernels._C",
        [str(path.relative_to(ROOT)) for path in sources],
        define_macros=macros,
        extra_compile_args=options,
        extra_link_args=threads,
        include_dirs=[str(precompiled), str(csrc)],
    )

    class BuildKernels(BuildExtension):
        def build_extensions(self) -> None:
            if sys.platform.startswith("linux"):
                folders = [*module.include_dirs, *self.compiler.include_dirs]
                flags = [*self.compiler.compiler_so[1:], *(f"-I{folder}" for folder in folders)]
                flags += [*cxx, *(f"-D{name}" for name, _ in macros if not cuda)]
                precompile("cpu/torch.h", precompiled, get_cxx_compiler(), flags)
            super().build_extensions()

    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildKernels}}


setup(**extension())
