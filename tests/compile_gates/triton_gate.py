"""Compiles the Triton kernels of every room without a GPU; no error, no spill.

``python -m tests.compile_gates.triton_gate [--quick] [OPERATOR ...]``. bfloat16, the type that
trains, for sm_80, sm_90 and sm_100; the others for sm_80 alone, which has the least shared memory.
``--quick`` compiles each kernel once for a type and an architecture, at the first of its sizes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import TYPE_CHECKING

from spectralx_kernels import _backends, inspect

if TYPE_CHECKING:
    from spectralx_kernels._triton import Compilation

# Filled before the processes that read it are forked: kernels cannot be sent to them.
_wanted: list[tuple[Compilation, int]] = []


def _line(place: int) -> tuple[str, str]:
    return inspect.line(*_wanted[place])


def _identity(compilation: Compilation, quick: bool) -> tuple[object, ...]:
    """What makes two compilations the same to the gate."""
    from spectralx_kernels._triton import source_of

    kernel = (compilation.kernel.__module__, compilation.kernel.__name__, compilation.dtype)
    if quick:
        return kernel
    source = source_of(compilation)
    return (
        *kernel, *map(str, (source.signature, source.constants, source.attrs)),
        str(compilation.options),
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    """Compile the kernels of the operators named, or of all."""
    quick = "--quick" in arguments
    operators = [argument for argument in arguments if argument != "--quick"]
    if not _backends.TRITON_INSTALLED:
        print("SKIPPED: triton is not installed; the Triton kernels were not compiled")
        return 0
    if reason := inspect.why_not():
        print(reason, file=sys.stderr)
        return 1
    seen = set()
    for compilation in inspect.compilations(operators):
        for architecture in compilation.architectures:
            if architecture != 80 and compilation.dtype != "bfloat16":
                continue
            key = (architecture, *_identity(compilation, quick))
            if key not in seen:
                seen.add(key)
                _wanted.append((compilation, architecture))
    print(inspect.HEADER)
    failed = 0
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for row, wrong in pool.imap(_line, range(len(_wanted))):
            print(f"{row}  {wrong}".rstrip(), flush=True)
            failed += wrong != ""
    total = len(_wanted)
    print(f"{total - failed} of {total} Triton compilations without an error or a spill")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
