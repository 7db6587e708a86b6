"""Every tool of compute-sanitizer finds the fault planted for it, and nothing where there is none.

    python -m tests.gpu.planted

Builds ``planted.cu`` with nvcc into ``build/gpu``. Status 1 and one line for each tool that misses
its fault or objects to the sound program; a clean run of the kernels says nothing then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cu")
TARGET = Path(__file__).parents[2] / "build" / "gpu" / "planted"
# What each tool says of its fault.
SAYS = {
    "memcheck": "Invalid __global__ write",
    "racecheck": "hazard",
    "initcheck": "Uninitialized __global__ memory read",
    "synccheck": "Barrier error",
}
FOUND = 9  # the exit status asked of the tools for a fault


def build(architecture: str | None = None) -> Path:
    """The program; raises CalledProcessError with what nvcc says."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a").replace(";", " ").split()
    name = architecture or listed[0].replace(".", "").removesuffix("+PTX")
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    code = f"-gencode=arch=compute_{name},code=sm_{name}"
    command = ["nvcc", "-std=c++17", "-lineinfo", code, str(SOURCE), "-o", str(TARGET)]
    subprocess.run(command, check=True)
    return TARGET


def watched(tool: str, fault: str) -> subprocess.CompletedProcess[str]:
    """A run of the program with this fault under the tool."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    return subprocess.run(
        [*command, str(TARGET), fault],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def failures() -> list[str]:
    """A line for each tool that is not to be trusted here."""
    found = []
    for tool, says in SAYS.items():
        run = watched(tool, tool)
        output = run.stdout + run.stderr
        if run.returncode != FOUND or says not in output:
            last = (output.strip().splitlines() or ["nothing said"])[-1]
            found.append(f"{tool}: missed its planted fault, status {run.returncode}: {last}")
        sound = watched(tool, "sound")
        if sound.returncode:
            found.append(f"{tool}: status {sound.returncode} where nothing is wrong")
    return found


def main() -> int:
    for needed in ("nvcc", "compute-sanitizer"):
        if shutil.which(needed) is None:
            print(f"{needed}: not found on PATH", file=sys.stderr)
            return 2
    build()
    found = failures()
    for failure in found:
        print(failure)
    print(f"{len(SAYS)} tools, {len(found)} failures")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
