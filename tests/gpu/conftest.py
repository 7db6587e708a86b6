"""Tests that need a CUDA GPU: marked ``gpu``, and skipped aloud where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spectralx_kernels import _backends

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen = torch.cuda.is_available()
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not seen:
                item.add_marker(pytest.mark.skip(reason="NOT RUN: torch sees no CUDA GPU"))


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
