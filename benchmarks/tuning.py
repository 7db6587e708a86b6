"""What `benchmarks.tune` found: rows, which default is to be changed and where, and their page."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ceilings
from benchmarks.report import as_markdown, number

ROOT = Path(__file__).parents[1]
GRAPHS, HOSTED = "graphs", "hosted"
WAYS = (GRAPHS, HOSTED)
COMPILE = "compile"
NOISE = 1.05  # ratios up to here are no difference


@dataclass
class Row:
    """One pass of one call, in every implementation.

    Parameters
    ----------
    operator, call, batch, mode, dtype : what was timed; `call` has the sizes.
    default : the backend that runs where none is asked for; `decided` is where that is said.
    milliseconds : of `GRAPHS`, replays of a CUDA graph, and `HOSTED`, calls from Python; medians by
        implementation.
    refused : why an implementation has no number, by implementation.
    copy : milliseconds of reading arguments and writing outputs once, by the measured copies.
    """

    operator: str
    call: str
    batch: int
    mode: str
    dtype: str
    default: str
    decided: str
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    copy: float | None = None

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.call, self.batch, self.mode, self.dtype

    def fastest(self, way: str) -> str | None:
        """The fastest backend; ``compile`` is none."""
        taken = {k: v for k, v in self.milliseconds.get(way, {}).items() if k != COMPILE}
        return min(taken, key=lambda name: taken[name]) if taken else None

    def over(self, way: str, other: str | None) -> float | None:
        """Time of the default over that of `other`."""
        taken = self.milliseconds.get(way, {})
        if other is None or other not in taken or self.default not in taken:
            return None
        return taken[self.default] / taken[other]

    def flags(self) -> list[str]:
        """What is wrong with the default here; nothing where it is the fastest."""
        found = []
        if self.refused.keys() & {self.default, "all"}:
            found.append(f"default {self.default} has no number")
        for way in WAYS:
            fastest = self.fastest(way)
            ratio = self.over(way, fastest)
            if ratio is not None and ratio > NOISE:
                found.append(f"{way}: {fastest} {ratio:.2f}x as fast")
            ratio = self.over(way, COMPILE)
            if ratio is not None and ratio > NOISE:
                found.append(f"{way}: slower than compile, {ratio:.2f}x")
        return found


def place_of(function: Callable[..., Any]) -> str:
    """``file:line name`` of a function of this project."""
    path = Path(inspect.getsourcefile(function) or "")
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{shown}:{inspect.getsourcelines(function)[1]} {function.__name__}"


def merged(path: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> list[Row]:
    """`rows`, and those of an earlier run of the same device and commit that are none of them."""
    if not path.exists():
        return list(rows)
    before = json.loads(path.read_text())
    if any(before["facts"].get(name) != facts.get(name) for name in ("device", "commit")):
        return list(rows)
    new = {row.key for row in rows}
    old = [Row(**row) for row in before["rows"]]
    return [*(row for row in old if row.key not in new), *rows]


def write(out: Path, name: str, rows: Sequence[Row], facts: Mapping[str, Any]) -> Path:
    """``<name>-tune.json`` and ``.md`` under `out`; rows of the same commit are kept."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-tune.json"
    rows = merged(path, rows, facts)
    content = {"facts": dict(facts), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(rows, facts))
    return path


def _times(row: Row, names: Sequence[str]) -> list[str]:
    return [number(row.milliseconds.get(way, {}).get(name), 3) for way in WAYS for name in names]


def changes(rows: Sequence[Row]) -> list[list[str]]:
    """Header, and a line for each row that is flagged."""
    header = ["operator", "dtype", "batch", "pass", "call", "default", "found", "decided in"]
    return [
        header,
        *(
            [row.operator, row.dtype, str(row.batch), row.mode, row.call, row.default,
             "; ".join(row.flags()), row.decided]
            for row in rows
            if row.flags()
        ),
    ]  # fmt: skip


def winners(rows: Sequence[Row]) -> list[list[str]]:
    """Header, and for each operator, dtype, batch and pass the default and the fastest backends, by
    the sum over its calls of what took every backend."""
    header = ["operator", "dtype", "batch", "pass", "default"]
    header += [f"fastest, {way}" for way in WAYS] + ["decided in"]
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.operator, row.dtype, row.batch, row.mode), []).append(row)
    lines = [header]
    for (operator, dtype, batch, mode), members in groups.items():
        best = []
        for way in WAYS:
            taken = [row.milliseconds.get(way, {}) for row in members]
            common = set.intersection(*map(set, taken)) - {COMPILE}
            sums = {name: sum(each[name] for each in taken) for name in common}
            best.append(min(sums, key=sums.__getitem__) if sums else "")
        defaults = ", ".join(dict.fromkeys(row.default for row in members))
        lines.append([operator, dtype, str(batch), mode, defaults, *best, members[0].decided])
    return lines


def page(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The Markdown page."""
    lines = [f"# Backends of every operator: {facts['device']}", ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()
              if name != "ceilings"]  # fmt: skip
    if "ceilings" in facts:
        lines.append(f"- ceilings: {ceilings.shown(facts['ceilings'])}")
    lines += [
        "", "`make gpu PART=tune`. Calls are those of training steps of ViT-L; medians in",
        "milliseconds, `graphs` of replays of a CUDA graph, `hosted` of calls from Python. `copy`",
        "is reading arguments and writing outputs once, at the measured bandwidth. A default is",
        "changed in the function under `decided in`: `_prefer` says when another backend than the",
        "device's first runs, `available` has the order of the device. The first is what",
        "`Operator(..., prefer=...)` is given.", "",
    ]  # fmt: skip
    flagged = changes(rows)
    lines += ["## Defaults that are not the fastest, or slower than compile", ""]
    lines += [as_markdown(flagged) if len(flagged) > 1 else "None of the rows measured.", ""]
    lines += ["## The fastest by operator", "", as_markdown(winners(rows)), ""]
    by_operator: dict[str, list[Row]] = {}
    for row in rows:
        by_operator.setdefault(row.operator, []).append(row)
    for operator, members in by_operator.items():
        timed = (each for row in members for each in row.milliseconds.values())
        names = list(dict.fromkeys(name for each in timed for name in each))
        header = ["call", "batch", "pass", "dtype", "default"]
        header += [f"{way} {name}" for way in WAYS for name in names] + ["copy", "default/copy"]
        table = [header]
        for row in members:
            taken = row.milliseconds.get(GRAPHS, {}).get(row.default)
            gap = taken / row.copy if taken is not None and row.copy else None
            table.append([row.call, str(row.batch), row.mode, row.dtype, row.default,
                          *_times(row, names), number(row.copy, 3), number(gap)])  # fmt: skip
        lines += [f"## {operator}", "", as_markdown(table), ""]
        for row in members:
            lines += [f"- {row.call}, batch {row.batch}, {row.mode}, {row.dtype}: no number of "
                      f"{name}: {why}" for name, why in row.refused.items()]  # fmt: skip
        lines.append("")
    return "\n".join(lines)
