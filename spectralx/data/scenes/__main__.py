"""``python -m spectralx.data.scenes``: write a synthetic data set."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from spectralx.cli import run_command

from .layouts import LAYOUTS
from .write import DEFAULT_COUNT, DEFAULT_SIZE, write_scenes

NAME = "spectralx.data.scenes"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(arguments: list[str] | None = None) -> int:
    """Write the scenes the command line asks for; the exit status."""
    given = sys.argv[1:] if arguments is None else arguments

    def body() -> None:
        options = _parser().parse_args(given)
        out = write_scenes(
            options.layout,
            options.out,
            size=options.size,
            count=options.count,
            seed=options.seed,
            overwrite=options.overwrite,
            progress=not options.quiet,
        )
        print(out)

    return run_command(NAME, body, debug="--debug" in given)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m {NAME}",
        description="Write synthetic scenes as GeoTIFF, in the layout of a real data set.",
    )
    parser.add_argument("--layout", required=True, choices=list(LAYOUTS), help="the data set")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--size", type=int, default=DEFAULT_SIZE, help="side of a tile, pixels (%(default)s)"
    )
    parser.add_argument(
        "--count", type=int, default=DEFAULT_COUNT, help="tiles a domain (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the data set in a folder that has one"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
