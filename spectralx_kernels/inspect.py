"""What the Triton kernels take of a GPU, compiled without one.

``python -m spectralx_kernels.inspect [--arch 80 90 100] [--op NAME ...]`` prints registers, shared
memory and spilled bytes of every kernel, at the sizes its room names.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from spectralx_kernels import _backends, _operator

if TYPE_CHECKING:
    from spectralx_kernels._triton import Compilation

HEADER = (
    f"{'kernel':24} {'dtype':9} {'shape':34} {'arch':>6} {'warps':>5} {'stages':>6} "
    f"{'registers':>9} {'shared':>7} {'spilled':>7}"
)


def why_not() -> str:
    """One line saying why nothing can be compiled here, or nothing."""
    if not _backends.TRITON_INSTALLED:
        return "triton: not installed"
    if _backends.INTERPRETED:
        return "TRITON_INTERPRET: set, expected unset: the interpreter compiles nothing"
    return ""


def compilations(operators: Sequence[str] = ()) -> Iterator[Compilation]:
    """Every kernel of the rooms of `operators`, or of all rooms, at the sizes the rooms name.

    Raises ValueError for an operator without Triton kernels.
    """
    modules = _operator.triton_modules()
    for name in operators:
        if name not in modules:
            expected = ", ".join(modules) or "none has Triton kernels"
            raise ValueError(f"op: got {name!r}, expected one of {expected}")
    wanted = {
        module: None for name, module in modules.items() if not operators or name in operators
    }
    for module in wanted:
        yield from importlib.import_module(module).compilations()


def line(compilation: Compilation, architecture: int) -> tuple[str, str]:
    """A row of the table, and what is wrong with the kernel: nothing, as it should be."""
    from spectralx_kernels._triton import SHARED_LIMIT, compile_for

    head = (
        f"{compilation.kernel.__name__:24} {compilation.dtype:9} {compilation.shape:34} "
        f"sm_{architecture:<3} {compilation.options['num_warps']:>5} "
        f"{compilation.options['num_stages']:>6} "
    )
    try:
        usage = compile_for(compilation, architecture)
    except Exception as error:  # whatever a compiler says of a kernel belongs in the table
        return head, f"{type(error).__name__}: {error}"
    wrong = f"spills {usage.spilled} bytes" if usage.spilled else usage.race
    if usage.shared > SHARED_LIMIT[architecture]:
        wrong = f"takes {usage.shared} bytes of {SHARED_LIMIT[architecture]} bytes shared memory"
    return f"{head}{usage.registers:>9} {usage.shared:>7} {usage.spilled:>7}", wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if nothing can be compiled or a kernel does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m spectralx_kernels.inspect", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=(80, 90, 100), default=(80, 90, 100))
    parser.add_argument("--op", nargs="+", default=(), metavar="NAME")
    options = parser.parse_args(arguments)
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 1
    try:
        listed = list(compilations(options.op))
    except ValueError as error:
        parser.error(str(error))
    print(HEADER)
    failed = False
    for compilation in listed:
        for architecture in [arch for arch in options.arch if arch in compilation.architectures]:
            row, wrong = line(compilation, architecture)
            print(f"{row}  {wrong}".rstrip(), flush=True)
            failed = failed or wrong != ""
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
