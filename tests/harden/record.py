"""What a part found, kept as JSON: slices that add up, with date, commit and machine.

``docs/reliability/<part>.json`` holds a list of slices. A slice is the samples numbered `seed` to
`seed + count - 1`; running some of them again replaces the slices that held them. Another command
that has figures for the page calls `append` as the parts here do.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "reliability"


@dataclass
class Outcome:
    """What a run of a part found.

    Parameters
    ----------
    checked : samples that were really run.
    failures : one line each, with what is needed to run that sample again.
    figures : by name; numbers of slices are added up, those named "worst ..." or "largest ..."
        take the largest, and dictionaries are joined by the same rules.
    exceptions : known ones, by name.
    """

    checked: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    exceptions: list[str] = field(default_factory=list)


def commit() -> str:
    """Of the working tree, with a mark where it holds changes to anything but the records."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", ".", ":!docs/reliability", ":!docs/RELIABILITY.md")
    return (head or "unknown") + ("+" if changed else "")


def machine() -> str:
    """Processor, torch and Python; a GPU where torch sees one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":", 1)[1].strip() if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{name}{gpu}, torch {torch.__version__}, Python {platform.python_version()}"


def path_of(part: str) -> Path:
    return FOLDER / f"{part}.json"


def load(part: str) -> list[dict[str, Any]]:
    """The slices of a part; none where it was not run."""
    path = path_of(part)
    slices: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return slices


def append(part: str, seed: int, count: int, seconds: float, outcome: Outcome) -> Path:
    """Add a slice to the part's file, written whole or not at all."""
    new = {
        "seed": seed,
        "count": count,
        **asdict(outcome),
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "machine": machine(),
    }
    path = path_of(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.parent.joinpath(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # slices of a part may end at the same time
        before = [
            slice_
            for slice_ in load(part)
            if slice_["seed"] + slice_["count"] <= seed or slice_["seed"] >= seed + count
        ]
        slices = sorted([*before, new], key=lambda slice_: slice_["seed"])
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(slices, indent=1, sort_keys=True) + "\n")
        partial.replace(path)
    return path


def joined(name: str, one: Any, two: Any) -> Any:
    """A figure of two slices."""
    if isinstance(one, dict):
        return {
            key: joined(name, one[key], two[key])
            if key in one and key in two
            else one.get(key, two.get(key))
            for key in {**one, **two}
        }
    if isinstance(one, str):
        return two
    return max(one, two) if name.startswith(("worst", "largest")) else one + two


def total(part: str) -> Outcome | None:
    """All slices of a part added up; None where it was not run."""
    slices = load(part)
    if not slices:
        return None
    found = Outcome()
    for slice_ in slices:
        found.checked += slice_["checked"]
        found.failures += slice_["failures"]
        found.exceptions = sorted({*found.exceptions, *slice_["exceptions"]})
        for name, value in slice_["figures"].items():
            known = name in found.figures
            found.figures[name] = joined(name, found.figures[name], value) if known else value
    return found
