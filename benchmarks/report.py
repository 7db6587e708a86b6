"""The ratio table of a benchmark run, printed and written as Markdown.

    python -m benchmarks.report FILE.json [--out DIR]

reads what ``pytest benchmarks --benchmark-json=FILE.json`` wrote, and keeps the table and the
medians as ``<machine>.md`` and ``<machine>.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ceilings
from benchmarks.shapes import IMPLEMENTATIONS

RESULTS = Path(__file__).parent / "results"
MEGABYTE = 2**20


@dataclass
class Group:
    """The rows of ``<op>/<shape>/<pass>/<dtype>``: medians in milliseconds, and facts."""

    name: str
    medians: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def ratio(self, over: str, under: str = "fused") -> float | None:
        """Time of `over` divided by time of `under`."""
        if over not in self.medians or under not in self.medians:
            return None
        return self.medians[over] / self.medians[under]

    def over_floor(self) -> float | None:
        return self.ratio("fused", "floor")

    def over_linear(self) -> float | None:
        """Time of `fused` over the frozen linear layer alone, where there is one."""
        alone = self.facts.get("floor", {}).get("linear_ms")
        fused = self.medians.get("fused")
        return None if alone is None or fused is None else fused / alone

    def roof(self) -> float | None:
        """What the group's floor takes by the ceilings of the run, in milliseconds."""
        facts = self.facts.get("floor", {})
        dtype = self.name.rsplit("/", 1)[1]
        measured = facts.get("ceilings", {})
        if "nbytes" not in facts or ceilings.COPY not in measured:
            return None
        if facts["operations"] and dtype not in measured:
            return None
        return 1e3 * ceilings.seconds(measured, facts["operations"], facts["nbytes"], dtype)

    def over_roof(self) -> float | None:
        roof, fused = self.roof(), self.medians.get("fused")
        return None if not roof or fused is None else fused / roof

    def memory(self, impl: str, fact: str) -> float | None:
        """`fact` of `impl` in MiB."""
        value = self.facts.get(impl, {}).get(fact)
        return None if value is None else value / MEGABYTE

    @property
    def in_float32(self) -> str:
        """The name of the same group in float32."""
        return self.name.rsplit("/", 1)[0] + "/float32"


class BadInputError(ValueError):
    """The file is not what this report reads; one line says why."""


def load(path: Path) -> tuple[list[Group], dict[str, Any]]:
    """Groups in the order of the run, and the facts that all rows share.

    Raises
    ------
    BadInputError : the file is missing, is not pytest-benchmark's JSON, or holds no rows of ours.
    """
    wanted = "expected a file that --benchmark-json wrote"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise BadInputError(f"{path}: {error.strerror}, {wanted}") from error
    except ValueError as error:
        raise BadInputError(f"{path}: no JSON ({error}), {wanted}") from error
    benchmarks = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(benchmarks, list):
        raise BadInputError(f"{path}: no list 'benchmarks', {wanted}")
    groups: dict[str, Group] = {}
    for row in benchmarks:
        impl = (row.get("params") or {}).get("impl")
        if impl not in IMPLEMENTATIONS or not row.get("group"):
            continue
        group = groups.setdefault(row["group"], Group(row["group"]))
        group.medians[impl] = row["stats"]["median"] * 1e3
        group.facts[impl] = row["extra_info"]
    if not groups:
        raise BadInputError(f"{path}: no rows with impl {', '.join(IMPLEMENTATIONS)}, {wanted}")
    first = next(iter(groups.values()))
    facts = dict(next(iter(first.facts.values())))
    facts["date"] = str(content.get("datetime", "unknown"))[:19].replace("T", " ")
    return list(groups.values()), facts


def number(value: float | None, digits: int = 2) -> str:
    """`value` for a table cell; empty where there is none."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value >= 0.1 else f"{value:.2g}"


COLUMNS = (
    "group",
    *(f"{impl} ms" for impl in IMPLEMENTATIONS),
    "eager/fused", "compile/fused", "dispatch/fused", "float32 dispatch/fused",
    "float32 eager/fused", "fused/floor", "roof ms", "fused/roof", "fused/linear",
    "peak MiB fused", "peak MiB eager", "saved MiB fused", "saved MiB eager", "saved MiB dispatch",
)  # fmt: skip


def cells(group: Group, groups: Mapping[str, Group]) -> list[str]:
    """One row of the table, under `COLUMNS`."""
    plain = groups.get(group.in_float32)
    across: dict[str, float] = {}
    if plain is not None and plain is not group and "fused" in group.medians:
        fused = group.medians["fused"]
        across = {impl: median / fused for impl, median in plain.medians.items()}
    return [
        group.name,
        *(number(group.medians.get(impl)) for impl in IMPLEMENTATIONS),
        *(number(group.ratio(impl)) for impl in ("eager", "compile", "dispatch")),
        *(number(across.get(impl)) for impl in ("dispatch", "eager")),
        number(group.over_floor()),
        number(group.roof(), 3),
        number(group.over_roof()),
        number(group.over_linear()),
        *(number(group.memory(impl, "peak_bytes"), 1) for impl in ("fused", "eager")),
        *(number(group.memory(impl, "saved_bytes"), 1) for impl in ("fused", "eager", "dispatch")),
    ]


def table(groups: Sequence[Group]) -> list[list[str]]:
    """Header and rows; columns without a single number are left out."""
    by_name = {group.name: group for group in groups}
    rows = [list(COLUMNS), *(cells(group, by_name) for group in groups)]
    kept = [place for place in range(len(COLUMNS)) if any(row[place] for row in rows[1:])]
    return [[row[place] for place in kept] for row in rows]


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Columns under a header of two lines, to be printed."""
    header = [name.rsplit(" ", 1) if " " in name else ["", name] for name in rows[0]]
    lines = [[first for first, _ in header], [second for _, second in header], *rows[1:]]
    widths = [max(len(line[place]) for line in lines) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = [":--", *("--:" for _ in rows[0][1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def machine_name(facts: Mapping[str, Any]) -> str:
    """A file name for the machine: device and threads (of a GPU: device alone), and what is not as
    usual in the run."""
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    if facts.get("device_type") != "cuda":
        name += f"-{facts['threads']}-threads"
    return "-".join([name, *(facts[fact] for fact in ("backend", "timed") if fact in facts)])


def document(groups: Sequence[Group], facts: Mapping[str, Any]) -> str:
    """The Markdown page of a run."""
    shown = ("device", "threads", "cpu_capability", "cuda", "torch", "python",
             "spectralx_kernels", "backend", "timed", "commit", "date")  # fmt: skip
    lines = [
        f"# {facts['device']}",
        "",
        *(f"- {name.replace('_', ' ')}: {facts[name]}" for name in shown if name in facts),
        *([f"- ceilings: {ceilings.shown(facts['ceilings'])}"] if "ceilings" in facts else []),
        "",
        "Medians in milliseconds; [benchmarks/README.md](../README.md) says how they are taken and",
        "what each column means. Every row has passed its accuracy check in this run.",
        "",
    ]
    operators: dict[str, list[Group]] = {}
    for group in groups:
        operators.setdefault(group.name.split("/", 1)[0], []).append(group)
    for op, members in operators.items():
        lines += [f"## {op}", "", as_markdown(table(members)), ""]
    return "\n".join(lines)


def summary(groups: Sequence[Group], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run: medians and facts, without single samples or the host's name.

    `load` reads it like the run itself.
    """
    rows = [
        {
            "group": group.name,
            "params": {"impl": impl},
            "stats": {"median": median / 1e3},
            "extra_info": group.facts[impl],
        }
        for group in groups
        for impl, median in group.medians.items()
    ]
    return {"datetime": facts["date"], "benchmarks": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"folder to write to (default: {RESULTS})"
    )
    options = parser.parse_args(arguments)
    try:
        groups, facts = load(options.file)
    except BadInputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
    print(as_text(table(groups)))
    options.out.mkdir(parents=True, exist_ok=True)
    page = options.out / f"{machine_name(facts)}.md"
    page.write_text(document(groups, facts))
    kept = page.with_suffix(".json")
    kept.write_text(json.dumps(summary(groups, facts), indent=1) + "\n")
    print(f"wrote {page}, {kept}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
