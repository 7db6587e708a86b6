"""README and docs: their Python runs, their links lead somewhere, the API pages can be made."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
# Pages whose blocks take a model or data of the reader's own; examples/ runs the same calls.
SKETCHES = {"README.md": "spectralx.adapt(vit"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path) -> None:
    sketch = SKETCHES.get(page.name)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        if sketch is None or sketch not in block:
            exec(compile(block, page.name, "exec"), names)


def test_every_sketch_is_on_its_page() -> None:
    for name, words in SKETCHES.items():
        assert any(words in block for block in blocks(ROOT / name, "python"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [
        target for target in targets if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


@pytest.mark.skipif(importlib.util.find_spec("pdoc") is None, reason="pdoc is not installed")
def test_api_pages_are_made(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdoc", "-d", "numpy", "-o", str(tmp_path)]
    done = subprocess.run(
        [*command, "spectralx_kernels", "spectralx"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "AoMoALinear" in (tmp_path / "spectralx_kernels.html").read_text()
    assert "Warning" not in done.stderr
