"""README and docs: their Python runs, their links lead somewhere, the API pages can be made."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
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


# Sizes and steps that make the commands of docs/training.md quick.
QUICK = {
    "spectralx.data.scenes": ["--count", "6", "--size", "32", "--quiet"],
    "spectralx.train": shlex.split(
        "--data.image_size 32 --model.embed_dim 16 --model.num_heads 2 --model.stem_dim 8"
        " --model.tokenizer_heads 2 --model.low_rank 4 --stage1.decoder_dim 16"
        " --stage1.decoder_depth 1 --stage1.decoder_heads 2 --stage1.fcn_dim 8"
        " --stage1.run.steps 1 --stage1.run.batch_size 2 --stage2.head_channels 8"
        " --stage2.run.steps 1 --stage2.run.batch_size 2 --trainer.progress false"
    ),
    "spectralx.evaluate": ["--pictures", "1"],
    "spectralx.predict": ["--progress", "false"],
}


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lightning", "rasterio")),
    reason="lightning or rasterio is not installed",
)
def test_the_way_from_images_to_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/training.md, one after the other."""
    monkeypatch.chdir(tmp_path)
    commands = [
        shlex.split(line)
        for block in blocks(ROOT / "docs" / "training.md", "sh")
        for line in block.splitlines()
    ]
    assert [command[2] for command in commands] == list(QUICK)
    for _, _, name, *options in commands:
        package = importlib.import_module(name)
        main = getattr(package, "main", None) or importlib.import_module(f"{name}.__main__").main
        assert main([*options, *QUICK[name]]) == 0, name
    assert (tmp_path / "report" / "report.html").is_file()
    assert len(list((tmp_path / "maps").glob("*.tif"))) == len(
        list((tmp_path / "scenes" / "ts" / "image").glob("*.tif"))
    )
