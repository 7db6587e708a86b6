"""A table of text, as Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Parameters
    ----------
    headings : of the columns.
    rows : as many cells each; the first names the row.
    caption : above the table.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headings):
                raise ValueError(
                    f"rows: found {len(row)} cells in {list(row)}; expected {len(self.headings)}"
                )

    def markdown(self) -> str:
        """A Markdown table, numbers to the right."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = ["---", *("---:" for _ in self.headings[1:])]
        lines = [line(self.headings), line(rule), *map(line, self.rows)]
        if self.caption:
            lines[:0] = [self.caption, ""]
        return "\n".join(lines) + "\n"

    def plain(self) -> str:
        """Aligned text for the terminal."""
        lines = [self.headings, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.headings))]

        def line(cells: Sequence[str]) -> str:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
            return "  ".join([cells[0].ljust(widths[0]), *padded[1:]]).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        text = [self.caption] if self.caption else []
        return "\n".join([*text, line(self.headings), rule, *map(line, self.rows)])

    def csv(self) -> str:
        """Comma-separated values, headings first."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.headings, *self.rows])
        return text.getvalue()

    def html(self) -> str:
        """An HTML table; every text is escaped."""

        def cells(row: Sequence[str], tag: str) -> str:
            first = f'<th scope="{"col" if tag == "th" else "row"}">{escape(row[0])}</th>'
            scope = ' scope="col"' if tag == "th" else ""
            return first + "".join(f"<{tag}{scope}>{escape(cell)}</{tag}>" for cell in row[1:])

        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in self.rows)
        return (
            f'<div class="wide"><table>{caption}\n<thead><tr>{cells(self.headings, "th")}</tr>'
            f"</thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )
