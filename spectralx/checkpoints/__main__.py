"""Commands on checkpoints.

``python -m spectralx.checkpoints inspect FILE`` says what a file is; ``... adapters FOLDER FILE``
writes what training changed of a checkpoint, alone, and says how large each part is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from spectralx.checkpoints.adapters import parts_of, read_adapters, save_adapters
from spectralx.checkpoints.folder import load
from spectralx.checkpoints.inspection import inspect
from spectralx.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="spectralx.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("inspect", help="say what a file is, without running any of it")
    one.add_argument("file", nargs="+", help="a file, or the folder of a checkpoint")
    one.add_argument("--debug", action="store_true", help="show tracebacks")
    two = commands.add_parser("adapters", help="write what training changed, alone")
    two.add_argument("checkpoint", help="folder of a checkpoint")
    two.add_argument("file", help="to write, .safetensors")
    two.add_argument("--leave-out", help=r"names to leave out, such as '^(neck|head)\.'")
    two.add_argument(
        "--include", help=r"frozen names to keep too, such as '^vit_backbone\.patch_embed\.'"
    )
    two.add_argument("--dtype", choices=["float16", "bfloat16"], help="of matrices; their own else")
    two.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(argv)

    def body() -> None:
        if options.command == "inspect":
            for file in options.file:
                print("\n".join(inspect(file)))
            return
        path = save_adapters(
            options.file,
            load(options.checkpoint).build(),
            leave_out=options.leave_out,
            include=options.include,
            dtype=options.dtype and getattr(torch, options.dtype),
        )
        for part, size in parts_of(read_adapters(path).tensors).items():
            print(f"{size / 1e6:10.2f} MB  {part}")
        print(f"{path.stat().st_size / 1e6:10.2f} MB  {path}")

    return run_command("spectralx.checkpoints", body, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
