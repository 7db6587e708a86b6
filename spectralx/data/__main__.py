"""Commands on data of one's own.

``python -m spectralx.data check CONFIG.yaml`` reads every file and prints what is wrong, one line a
problem (exit status 2 if there is any); ``... manifest CONFIG.yaml`` writes each file's SHA-256.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from spectralx.cli import INPUT_STATUS, refresh_seconds, run_command

from .check import check, files_of
from .checksums import write_checksums
from .description import read_description

NAME = "spectralx.data"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("check", "read every file and say what is wrong"),
        ("manifest", "write the SHA-256 of each file"),
    ):
        one = commands.add_parser(name, help=what)
        one.add_argument("config", help="YAML file that describes the data set")
        one.add_argument("--quiet", action="store_true", help="no progress bar")
        one.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)

    def body() -> int:
        description = read_description(options.config)
        if options.command == "check":
            report = check(description, progress=not options.quiet)
            print("\n".join(report.summary))
            for problem in report.problems:
                print(problem, file=sys.stderr)
            count = len(report.problems)
            print(f"{count or 'no'} problem{'' if count == 1 else 's'}")
            return INPUT_STATUS if report.problems else 0
        files = files_of(description)
        with tqdm(
            files, desc="manifest", unit="file", disable=options.quiet,
            mininterval=refresh_seconds(),
        ) as bar:  # fmt: skip
            count = write_checksums(description.manifest, files, lambda path: bar.update())
        print(f"{description.manifest}: {count} files")
        return 0

    return run_command(NAME, body, debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
