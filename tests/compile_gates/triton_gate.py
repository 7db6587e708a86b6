"""Compiles the Triton kernels of every room without a GPU; no error, no spill.

``python -m tests.compile_gates.triton_gate [OPERATOR ...]``. bfloat16, the type that trains, for
sm_80, sm_90 and sm_100; the others for sm_80 alone, which has the least shared memory.
"""

from __future__ import annotations

import sys

from spectralx_kernels import _backends, inspect


def main(operators: list[str]) -> int:
    """Compile the kernels of `operators`, or of all."""
    if not _backends.TRITON_INSTALLED:
        print("SKIPPED: triton is not installed; the Triton kernels were not compiled")
        return 0
    if reason := inspect.why_not():
        print(reason, file=sys.stderr)
        return 1
    print(inspect.HEADER)
    compiled = failed = 0
    for compilation in inspect.compilations(operators):
        for architecture in compilation.architectures:
            if architecture != 80 and compilation.dtype != "bfloat16":
                continue
            row, wrong = inspect.line(compilation, architecture)
            print(f"{row}  {wrong}".rstrip(), flush=True)
            compiled += 1
            failed += wrong != ""
    print(f"{compiled - failed} of {compiled} Triton compilations without an error or a spill")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
