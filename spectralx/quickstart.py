"""From nothing to a trained model in minutes: ``python -m spectralx.quickstart``.

Writes synthetic scenes in the layout of WHU-OHS, trains both stages of a small model on the
source region, scores it on the source and on the target region, and checks that both stages
learnt. What it runs is the packaged configuration ``quickstart``; options override it as in
`spectralx.train`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spectralx.cli import run_command
from spectralx.data.scenes import write_scenes
from spectralx.fit import FitResult, fit
from spectralx.options import add_fresh, make_parser, parse_settings
from spectralx.settings import Settings
from spectralx.train import report

TILE_SIZE = 64
TILES = 150
# What "learnt" means: stage 1's masked loss at most this share of its start, stage 2's mIoU on the
# source test at least this far above the best constant answer.
LARGEST_LOSS_SHARE = 0.5
SMALLEST_GAIN = 0.30


@dataclass(frozen=True)
class Check:
    """A fact about a run, and whether it is as it should be."""

    text: str
    passed: bool

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'FAILED'}: {self.text}"


def check_stage1(result: FitResult) -> Check:
    """The masked loss on the validation images fell by at least half."""
    before, after = result.before["masked_loss"], result.after["masked_loss"]
    return Check(
        f"stage 1: masked loss on validation images {before:.4f} before training, {after:.4f} "
        f"after ({after / before:.2f} of it; at most {LARGEST_LOSS_SHARE} wanted)",
        after <= LARGEST_LOSS_SHARE * before,
    )


def check_stage2(result: FitResult) -> Check:
    """The mIoU on the source test is 30 points above that of always answering one class."""
    assert result.evaluation is not None
    scores = result.evaluation.scores["source"]
    constant = scores.majority_miou()
    return Check(
        f"stage 2: mIoU on the source test {100 * scores.miou:.1f} %, always the commonest class "
        f"{100 * constant:.1f} % ({100 * (scores.miou - constant):.1f} points apart; at least "
        f"{100 * SMALLEST_GAIN:.0f} wanted)",
        scores.miou >= constant + SMALLEST_GAIN,
    )


def scenes_for(settings: Settings) -> Path:
    """The folder ``settings.data.root`` with scenes in it; those that are there are kept."""
    folder = Path(settings.data.root)
    if folder.is_dir() and any(folder.iterdir()):
        print(f"scenes: {folder} is there already")
        return folder
    write_scenes("whu-ohs", folder, size=TILE_SIZE, count=TILES, seed=settings.seed)
    print(f"scenes: {TILES} tiles a region in {folder}")
    return folder


def run(settings: Settings, *, fresh: bool = False) -> list[Check]:
    """Scenes, stage 1, stage 2; the checks on what was learnt. `fresh` is that of `fit`."""
    scenes_for(settings)
    results = {}
    for stage in ("stage1", "stage2"):
        started = time.monotonic()
        results[stage] = fit(stage, settings, fresh=fresh)
        seconds = time.monotonic() - started
        print(f"{report(stage, results[stage])}\n{stage} took {seconds:.0f} s\n", flush=True)
    return [check_stage1(results["stage1"]), check_stage2(results["stage2"])]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m spectralx.quickstart``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)

    def body() -> int:
        started = time.monotonic()
        parser = make_parser("spectralx.quickstart")
        add_fresh(parser)
        settings, others = parse_settings(parser, ["--config", "quickstart", *arguments])
        if not any(argument.startswith("--data.root") for argument in arguments):
            settings.data.root = str(Path(settings.out) / "scenes")
        checks = run(settings, fresh=others["fresh"])
        for check in checks:
            print(check)
        print(
            f"quickstart took {time.monotonic() - started:.0f} s; everything is in {settings.out}"
        )
        return 0 if all(check.passed for check in checks) else 1

    return run_command("spectralx.quickstart", body, debug="--debug" in arguments)


if __name__ == "__main__":
    sys.exit(main())
