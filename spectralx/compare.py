"""Compare methods on one task with the same budget: ``python -m spectralx.compare``.

    python -m spectralx.compare --config quickstart.yaml --scenes --pretrain 200 \\
        --methods spectralx,lora,frozen --seeds 0,1,2 --out runs/comparison

Every method runs with every seed, through the same stages of the same length. The same command
again goes on where it was interrupted: finished stages are not repeated, and methods and seeds can
be added. Options override the configuration as in `spectralx.train`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from spectralx.cli import InputError, run_command
from spectralx.comparison.methods import METHODS, chosen_methods
from spectralx.comparison.report import write_report
from spectralx.comparison.runs import PLAN, Plan, run_all
from spectralx.options import make_parser, parse_settings
from spectralx.quickstart import scenes_for


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seeds(text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isdigit() for word in words) or len({*words}) < len(words):
        raise InputError(f"seeds: found {text!r}; expected different whole numbers, such as 0,1,2")
    return [int(word) for word in words]


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt("stopped; the same command goes on from the last finished stage")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m spectralx.compare``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def body() -> None:
        parser = make_parser("spectralx.compare")
        every = ",".join(method.name for method in METHODS)
        parser.add_argument("--methods", type=str, default=every, help="names, with commas")
        parser.add_argument("--seeds", type=str, default="0,1,2", help="whole numbers, with commas")
        parser.add_argument(
            "--pretrain",
            type=int,
            default=0,
            help="steps of an optical backbone all start from, where there are no public weights",
        )
        parser.add_argument(
            "--minutes", type=float | None, help="start no stage after so many; call again to go on"
        )
        parser.add_argument(
            "--scenes", action="store_true", help="write synthetic scenes and compare on them"
        )
        settings, own = parse_settings(parser, arguments)
        if own["pretrain"] < 0:
            raise InputError(f"pretrain: found {own['pretrain']}; expected at least 0")
        plan = Plan(
            settings, chosen_methods(_words(own["methods"])), _seeds(own["seeds"]), own["pretrain"]
        )
        if own["scenes"]:
            settings.data.root = str(Path(f"{plan.folder}-scenes"))
            scenes_for(settings)
        try:
            run_all(plan, own["minutes"])
        finally:
            if (plan.folder / PLAN).is_file():
                print(write_report(plan))

    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return run_command("spectralx.compare", body, debug="--debug" in arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
