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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
