"""setup.py: its switches, and the errors of switches that cannot be met."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from spectralx_kernels import _backends

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools")


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("CXX", "DEBUG")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_asked_for_cuda_with_a_cpu_torch_stops_with_one_line() -> None:
    done = setup("--name", FORCE_CUDA="1")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("FORCE_CUDA=1: torch")


def test_contradicting_switches_are_refused() -> None:
    done = setup("--name", FORCE_CUDA="1", USE_CUDA="0")
    assert "FORCE_CUDA=1 and USE_CUDA=0" in done.stderr
    assert done.returncode != 0


def test_misspelt_switch_is_refused() -> None:
    done = setup("--name", SPECTRALX_NATIVE="maybe")
    assert "SPECTRALX_NATIVE: got 'maybe', expected 0 or 1" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [{"SPECTRALX_NO_EXT": "1"}, {"PATH": "/nowhere", "CXX": ""}],
    ids=["asked", "no compiler"],
)
def test_builds_without_the_extension(environment: dict[str, str]) -> None:
    done = setup("--name", **environment)
    assert done.returncode == 0, done.stderr
    assert "building without the extension module" in done.stdout


def test_pure_wheel_holds_readmes_configs_and_types(tmp_path: Path) -> None:
    done = setup(
        "bdist_wheel", "-d", str(tmp_path), "-b", str(tmp_path / "build"), SPECTRALX_NO_EXT="1"
    )
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for expected in (
        "spectralx_kernels/py.typed",
        "spectralx_kernels/aomoa/README.md",
        "spectralx/py.typed",
    ):
        assert expected in names
    assert any(name.startswith("spectralx/configs/") for name in names)


@pytest.mark.skipif(_backends.extension() is None, reason="the extension module was not built")
def test_extension_tells_how_it_was_built() -> None:
    extension = _backends.extension()
    assert extension is not None
    info = extension.build_info()
    assert {"torch", "compiler", "cuda", "cuda_architectures", "native", "debug"} <= info.keys()
    assert torch.__version__.startswith(info["torch"])
