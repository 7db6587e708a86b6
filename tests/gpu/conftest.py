"""Tests that need a CUDA GPU: marked ``gpu``, and skipped aloud where there is none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spectralx_kernels import _backends

_HERE = Path(__file__).parent
_BEGIN = time.monotonic()
LONGEST = "test_step.py"  # tests of ten seconds each


def in_turn(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """`items` for ``--dist worksteal``, which hands each worker one stretch of the list and then
    moves the rear of what is left: the same function in the same dtype, and with it the Triton
    kernels it compiles, side by side; the longest tests at the head of every stretch."""

    def alike(item: pytest.Item) -> tuple[str, str, str]:
        given = getattr(item, "callspec", None)
        dtype = "" if given is None else str(given.params.get("dtype", ""))
        return item.path.name, getattr(item, "originalname", item.name), dtype

    items = sorted(items, key=alike)
    long = [item for item in items if item.path.name == LONGEST]
    others = [item for item in items if item.path.name != LONGEST]
    total, found = len(items), list[pytest.Item]()
    for worker in range(workers):
        ahead = long[worker::workers]
        rest = total * (worker + 1) // workers - total * worker // workers - len(ahead)
        found += ahead + others[: max(rest, 0)]
        others = others[max(rest, 0) :]
    return found + others


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if _HERE in item.path.parents]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items[:] = [item for item in items if _HERE not in item.path.parents] + in_turn(own, workers)
    seen = torch.cuda.is_available()
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not seen:
                item.add_marker(pytest.mark.skip(reason="NOT RUN: torch sees no CUDA GPU"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that would begin after ``SPECTRALX_GPU_SECONDS`` fails; the others are reported."""
    limit = float(os.environ.get("SPECTRALX_GPU_SECONDS", "inf"))
    if _HERE in item.path.parents and time.monotonic() - _BEGIN > limit:
        pytest.fail(f"NOT RUN: {limit:g} s are over", pytrace=False)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Failures(config), "failures-of-the-gpu")


class Failures:
    """Says at once what fails: a run that is cut off may not come to its end's report."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            why = str(getattr(report.longrepr, "reprcrash", None) or report.longrepr)
            reporter.write_line(f"\nFAILED {report.nodeid}: {why.strip()[:300]}")
            reporter.flush()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every backend of the module's ``OPERATOR`` that runs on CUDA here."""
    if "backend" in metafunc.fixturenames:
        here = _backends.available(metafunc.module.OPERATOR.name, "cuda")
        metafunc.parametrize("backend", here)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """float32 means float32: no TF32 in the vendor's products or convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
