"""Commands on checkpoints: ``python -m spectralx.checkpoints inspect FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spectralx.checkpoints.inspection import inspect
from spectralx.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="spectralx.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("inspect", help="say what a file is, without running any of it")
    one.add_argument("file", nargs="+", help="a file, or the folder of a checkpoint")
    one.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(argv)

    def body() -> None:
        for file in options.file:
            print("\n".join(inspect(file)))

    return run_command("spectralx.checkpoints", body, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
