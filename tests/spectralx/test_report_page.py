"""The HTML report as a browser opens it; `test_evaluation` reads it without one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from matplotlib.image import imread

from spectralx.evaluation.report import write_report
from tests.spectralx.test_evaluation import StrictPage, result

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FOUND = next((path for path in map(shutil.which, BROWSERS) if path is not None), None)
OPTIONS = (
    "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--enable-logging=stderr", "--window-size=1100,2000",
)  # fmt: skip
# What the browser made of the page, as its title. The report itself has no script.
PROBE = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  widths: [...document.images].map((image) => image.naturalWidth),
  fetched: performance.getEntriesByType("resource").map((each) => each.name)
    .filter((name) => !name.startsWith("data:")),
  wide: document.documentElement.scrollWidth,
  headings: [...document.querySelectorAll("h1, h2, h3")].map((each) => each.textContent),
}); });</script></body>"""


def opened(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`page` in a headless browser with a profile of its own; nothing on its console."""
    assert FOUND is not None
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [FOUND, *OPTIONS, *root, f"--user-data-dir={profile}", *options, page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "CONSOLE" not in run.stderr, run.stderr
    return run


@pytest.mark.skipif(FOUND is None, reason="no Chromium or Chrome: the report was not opened in one")
def test_a_browser_opens_the_report_without_errors(tmp_path: Path) -> None:
    matrices = {
        "source": [[0, 0, 0], [1, 40, 3], [0, 2, 31]],
        "target x": [[0, 0, 0], [0, 8, 0], [0, 5, 9]],
        "target y": [[0, 0, 0], [0, 7, 2], [0, 2, 2]],
    }
    write_report([result(matrices, matrices)], tmp_path)
    report = tmp_path / "report.html"
    words = StrictPage(report.read_text())
    probed = tmp_path / "probed.html"
    probed.write_text(report.read_text().replace("</body>", PROBE))
    dom = opened(probed, tmp_path / "profile", "--dump-dom").stdout
    title = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    seen = json.loads(unescape(title[1]))
    assert len(seen["widths"]) == len(words.images) == 4
    assert min(seen["widths"]) > 300  # each picture was decoded
    assert seen["fetched"] == []
    assert seen["wide"] <= 1100  # nothing sticks out of the window
    assert seen["headings"][0] == "Evaluation"
    assert set(seen["headings"]) <= set(words.texts)
    picture = tmp_path / "report.png"
    opened(report, tmp_path / "profile", f"--screenshot={picture}")
    shown = imread(picture)
    assert shown.shape[:2] == (2000, 1100)
    assert shown[..., :3].std() > 0.05  # not blank
