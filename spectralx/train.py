"""Train an experiment: ``python -m spectralx.train stage1|stage2|both --config NAME.yaml``.

Options override the configuration, e.g. ``--data.root DIR --stage2.run.steps 500``;
``--help`` lists them all, ``--print_config`` prints what would run. `fit` does the same in a
program. The same command again goes on from where a run was interrupted; ``--fresh`` starts again.
Several processes: ``torchrun --nproc-per-node N -m spectralx.train ...``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spectralx.cli import run_command
from spectralx.data.damage import counts
from spectralx.finished import FitResult
from spectralx.fit import Stage, fit
from spectralx.machine import leave_processes
from spectralx.options import add_fresh, load_settings, make_parser, parse_settings
from spectralx.settings import Settings

__all__ = ["FitResult", "Settings", "fit", "load_settings", "main", "report"]


def report(stage: Stage, result: FitResult) -> str:
    """What a stage reached, for the terminal."""
    lines = []
    for name, value in result.after.items():
        start = result.before.get(name)
        before = "" if start is None else f"{start:.5f} before training, "
        lines.append(f"{stage} validation {name}: {before}{value:.5f} after")
    if result.evaluation is not None:
        lines += [f"{stage} test of {result.best}:", result.evaluation.table()]
    for name, count in counts(result.skipped).items():
        lines.append(f"{stage} {name}: {count} damaged files left out")
    lines.append(f"logs, pictures and checkpoints: {result.folder}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m spectralx.train``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        parser = make_parser("spectralx.train")
        add_fresh(parser)
        parser.add_argument("stage", choices=["stage1", "stage2", "both"], help="what to train")
        settings, others = parse_settings(parser, arguments)
        stages: tuple[Stage, ...] = (
            ("stage1", "stage2") if others["stage"] == "both" else (others["stage"],)
        )
        for stage in stages:
            result = fit(stage, settings, fresh=others["fresh"])
            if result.evaluation is not None:
                print(report(stage, result), flush=True)
        leave_processes()

    return run_command("spectralx.train", body, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
