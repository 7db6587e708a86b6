"""docs/RELIABILITY.md from the JSON that the parts wrote: nothing on it is typed by hand."""

from __future__ import annotations

from typing import Any

from tests.harden.parts import PARTS, Part
from tests.harden.record import FOLDER, ROOT, Outcome, load, total

PAGE = ROOT / "docs" / "RELIABILITY.md"
_SHOWN = 10  # failures of a part that the page lists


def verdict(part: Part, found: Outcome | None) -> str:
    """One of "not run", "failed", "partly run", "passed", with the figures that say it."""
    if found is None:
        return "not run"
    if found.failures:
        return f"**failed**: {len(found.failures):,} of {found.checked:,}"
    if found.checked < part.count:
        return f"partly run: {found.checked:,} of {part.count:,}, 0 failures"
    return f"passed: {found.checked:,}, 0 failures"


def _figures(found: Outcome) -> list[str]:
    lines = []
    for name, value in sorted(found.figures.items()):
        if isinstance(value, dict):
            entries = ", ".join(f"{key} {_number(each)}" for key, each in sorted(value.items()))
            lines.append(f"- {name}: {entries}")
        else:
            lines.append(f"- {name}: {_number(value)}")
    return lines


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _origin(name: str) -> list[str]:
    """Command, dates, commits and machines of a part."""
    slices = load(name)
    seconds = sum(slice_["seconds"] for slice_ in slices)
    dates = sorted(slice_["date"] for slice_ in slices)
    commits = sorted({slice_["commit"] for slice_ in slices})
    machines = sorted({slice_["machine"] for slice_ in slices})
    command = PARTS[name].command or f"python -m tests.harden {name}"
    cut = f" in {len(slices)} slices" if len(slices) > 1 else ""
    return [
        f"`{command}`, {dates[-1]} UTC, {seconds:,.0f} s{cut}, "
        f"commit {', '.join(commits)}; {'; '.join(machines)}"
    ]


def text() -> str:
    """The page."""
    lines = [
        "# Reliability",
        "",
        "Written by `python -m tests.harden page` from the figures in `docs/reliability/`, which",
        "the commands named below write. A `+` after a commit: the tree held changes. What was not",
        "run is said to be not run.",
        "",
        "| # | what | asked | found |",
        "|---|---|---|---|",
    ]
    totals = {name: total(name) for name in PARTS}
    for name, part in PARTS.items():
        lines.append(
            f"| {part.row} | {part.title} | {part.figure} | {verdict(part, totals[name])} |"
        )
    for name, part in PARTS.items():
        found = totals[name]
        if found is None:
            continue
        lines += ["", f"## {part.row}. {name}", "", *_origin(name)]
        figures = _figures(found)
        lines += ["", *figures] if figures else []
        if found.exceptions:
            lines += ["", "Exceptions, by name:", ""]
            lines += [f"- {exception}" for exception in found.exceptions]
        if found.failures:
            lines += ["", "Failures:", ""]
            lines += [f"- {failure}" for failure in found.failures[:_SHOWN]]
            more = len(found.failures) - _SHOWN
            lines += [f"- and {more:,} more in {FOLDER.name}/{name}.json"] if more > 0 else []
    return "\n".join(lines) + "\n"


def write() -> None:
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text())
