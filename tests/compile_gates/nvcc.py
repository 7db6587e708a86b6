"""Compiles the CUDA device code for sm_80 and sm_90a without a GPU; no warning, no spill.

``python -m tests.compile_gates.nvcc [FILE.cu ...]`` prints registers, static shared memory, stack
and spills of every kernel, and ends with status 1 if one spills or nvcc says anything.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90a")
FLAGS = (
    "-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-Xcompiler", "-Wall",
)  # fmt: skip


class Kernel(NamedTuple):
    name: str
    registers: int
    shared: int
    stack: int
    spilled: int  # bytes stored and loaded


def parse(log: str) -> list[Kernel]:
    """Kernels in the order of ptxas's report."""
    kernels = []
    for entry in log.split("Compiling entry function '")[1:]:
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        if spills is None or registers is None:
            raise ValueError(f"ptxas: got {entry!r}, expected its report of a kernel")
        kernels.append(
            Kernel(
                entry[: entry.index("'")],
                int(registers[1]),
                int(shared[1]) if shared else 0,
                int(spills[1]),
                int(spills[2]) + int(spills[3]),
            )
        )
    return kernels


def readable(names: list[str]) -> list[str]:
    """Demangled names without arguments."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    shown = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        re.sub(r"\(.*$|spectralx::cuda::|^void |\(anonymous namespace\)::", "", n) for n in shown
    ]


def compile_file(nvcc: str, source: Path, architecture: str) -> tuple[str, bool]:
    """Compile one file: the report on it, and whether it passed."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, f"-gencode={target}", "-I", str(ROOT / "csrc"), "-c", str(source)]
        done = subprocess.run(
            [*command, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=False
        )
    log = done.stdout + done.stderr
    lines = [f"{source.relative_to(ROOT)} sm_{architecture}"]
    if done.returncode != 0 or "warning" in log:
        return f"{lines[0]}\n{log}", False
    kernels = parse(log)
    passed = bool(kernels)
    for name, kernel in zip(readable([k.name for k in kernels]), kernels, strict=True):
        spills = f"  SPILLS {kernel.spilled} bytes" if kernel.spilled else ""
        stack = f"  stack {kernel.stack}" if kernel.stack else ""
        lines.append(
            f"  {name:<64} {kernel.registers:>4} registers {kernel.shared:>6} shared{stack}{spills}"
        )
        passed = passed and kernel.spilled == 0
    return "\n".join(lines), passed


def main(arguments: list[str]) -> int:
    """Compile the files named, or all of csrc/cuda."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("SKIPPED: nvcc was not found on PATH; the CUDA sources were not compiled")
        return 0
    sources = [Path(name).resolve() for name in arguments]
    sources = sources or sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
    results = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = itertools.product((nvcc,), sources, ARCHITECTURES)
        for report, passed in pool.map(lambda job: compile_file(*job), jobs):
            print(report, flush=True)
            results.append(passed)
    print(f"{sum(results)} of {len(results)} compilations without a warning or a spill")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
