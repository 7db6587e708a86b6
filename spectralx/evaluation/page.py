"""A self-contained HTML page: style and pictures inside, no script, nothing fetched."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from pathlib import Path

from spectralx.evaluation.tables import Table

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --quiet: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1.05rem; margin-top: 1.8rem; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; } tbody th { font-weight: normal; }
td, tbody th { white-space: nowrap; }
figure { margin: 1rem 0; } figcaption { color: var(--quiet); }
img { max-width: 100%; height: auto; background: #fff; }
"""


class Page:
    """Parts of a page, in order; every text is escaped.

    Parameters
    ----------
    title : of the page, and its first heading.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading of level 2 or deeper."""
        self.parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{escape(text)}</p>")

    def items(self, texts: list[str]) -> None:
        """A list; nothing where `texts` is empty."""
        if texts:
            lines = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
            self.parts.append(f"<ul>\n{lines}</ul>")

    def table(self, table: Table) -> None:
        """A table."""
        self.parts.append(table.html())

    def picture(self, png: Path, caption: str) -> None:
        """The PNG file `png`, its bytes inside the page."""
        data = b64encode(png.read_bytes()).decode("ascii")
        words = escape(caption)
        self.parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{words}">'
            f"<figcaption>{words}</figcaption></figure>"
        )

    def html(self) -> str:
        """The whole page."""
        body = "\n".join(self.parts)
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n{body}\n</body>\n</html>\n"
        )
